import { api } from "../../../scripts/api.js";

/**
 * The texts of one part of the page (locales/<language>/main.json), in the language of ComfyUI's page.
 * What a language lacks stays English. ComfyUI's own /i18n fails for all packs where one of them has a broken file.
 */
export async function texts(part) {
  const [translations, language] = await Promise.all(["/textual_inversion/texts", "/settings/Comfy.Locale"].map(answer));
  const chosen = translations[language ?? preferred(translations)];
  return merged(translations.en[part], chosen?.[part] ?? {});
}

async function answer(route) {
  return await (await api.fetchApi(route)).json();
}

/** The browser's language, as ComfyUI chooses where the user has not. */
function preferred(translations) {
  const known = navigator.languages.flatMap((language) => [language, language.split("-")[0]]);
  return known.find((language) => language in translations);
}

function merged(english, translated) {
  return Object.fromEntries(
    Object.entries(english).map(([key, text]) => [
      key,
      typeof text === "object" ? merged(text, translated[key] ?? {}) : (translated[key] ?? text),
    ]),
  );
}
