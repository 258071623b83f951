/* What the picture list asks the server (nodes/pictures_route.py). */

import { api } from "../../../scripts/api.js";
import { filled } from "./page.js";

/** The server's answer was no; the message says why. */
export class Refused extends Error {}

export class PictureRequests {
  constructor(texts) {
    this.texts = texts;
  }

  /** The answer as an object. Throws Refused, or an Error if there is no answer; the messages are for the user. */
  async ask(what, query, options = {}) {
    let answer;
    try {
      answer = await api.fetchApi(`/textual_inversion/${what}?${new URLSearchParams(query)}`, options);
    } catch {
      throw new Error(this.texts.noResponse);
    }
    if (answer.ok) return await answer.json();
    if (answer.status === 400) throw new Refused((await answer.json()).error);
    throw new Refused(filled(this.texts[answer.status === 413 ? "tooLarge" : "refused"], { status: answer.status }));
  }

  /** `{pictures, concepts, left_out, folders}`; `concepts` are folders in the folder: `{name, place, pictures}`. */
  list(place) {
    return this.ask("pictures", place, { cache: "no-store" });
  }

  /** Writes a picture into a folder and returns its name there, which differs if the name was taken. */
  async add(folder, file) {
    return (await this.ask("pictures", { folder, name: file.name }, { method: "POST", body: file })).name;
  }

  /** Deletes a picture and its caption. */
  remove(folder, name) {
    return this.ask("pictures", { folder, name }, { method: "DELETE" });
  }

  /** Makes a text or a file the caption of a picture; an empty one means none. */
  writeCaption(folder, name, body) {
    return this.ask("caption", { folder, name }, { method: "PUT", body });
  }

  /** Why there is no thumbnail at this address. */
  async whyNot(address) {
    try {
      const answer = await fetch(address, { cache: "no-store" });
      return answer.ok ? "" : (await answer.json()).error;
    } catch {
      return this.texts.noResponse;
    }
  }
}

/** The address of a thumbnail; `side` is small or large. */
export function thumbnail(place, { name, modified }, side) {
  return api.apiURL(`/textual_inversion/thumbnail?${new URLSearchParams({ ...place, name, modified, side })}`);
}
