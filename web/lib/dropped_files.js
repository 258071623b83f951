/* What people bring: pictures and captions, dropped with or without their folder, or pasted. */

const PICTURE = /\.(avif|bmp|gif|heic|heif|jpe?g|png|tiff?|webp)$/i;
const CAPTION = /\.(txt|caption)$/i;

export const isPicture = (file) => file.type.startsWith("image/") || PICTURE.test(file.name);
export const isCaption = (file) => CAPTION.test(file.name);
/** NAME of the captions NAME.txt and NAME.caption. */
export const captionStem = (name) => name.replace(CAPTION, "");
export const stem = (name) => name.replace(/\.[^.]*$/, "");

/** `{files, folders}` of a drop or a paste, or null if nothing of it is for us, such as a workflow. */
export function brought(dataTransfer) {
  const items = [...(dataTransfer?.items ?? [])].filter((item) => item.kind === "file");
  const entries = items.map((item) => item.webkitGetAsEntry()); // only now: it is empty after the event
  const folders = entries.filter((entry) => entry?.isDirectory);
  const files = items.filter((_, index) => !entries[index]?.isDirectory).map((item) => item.getAsFile());
  const ours = folders.length || files.some((file) => isPicture(file) || isCaption(file));
  return ours ? { files, folders } : null;
}

/**
 * The files in a dropped folder, as `{name, files}`: one entry for each folder in it where several of these hold
 * pictures and it has none of its own, otherwise a single one without a name.
 */
export async function partsOf(folder) {
  const direct = [];
  const inside = [];
  for (const entry of await entriesIn(folder)) {
    if (entry.isDirectory) inside.push({ name: entry.name, files: await filesIn(entry) });
    else direct.push(await fileOf(entry));
  }
  const concepts = inside.filter(({ files }) => files.some(isPicture));
  if (concepts.length > 1 && !direct.some(isPicture)) return [...inside, { name: "", files: direct }];
  return [{ name: "", files: [...direct, ...inside.flatMap(({ files }) => files)] }];
}

/** All files in a folder and in those below it, but hidden ones. */
async function filesIn(folder) {
  const found = [];
  for (const entry of await entriesIn(folder)) {
    if (entry.isDirectory) found.push(...(await filesIn(entry)));
    else found.push(await fileOf(entry));
  }
  return found;
}

/** The folder that a dropped file was in: captions belong to pictures beside them. */
const folders = new WeakMap();
export const folderOf = (file) => folders.get(file) ?? "";

async function entriesIn(folder) {
  const reader = folder.createReader();
  const found = [];
  for (;;) {
    const entries = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // some 100 at a time
    if (!entries.length) return found;
    found.push(...entries.filter(({ name }) => !name.startsWith(".")));
  }
}

async function fileOf(entry) {
  const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
  folders.set(file, entry.fullPath.slice(0, -entry.name.length));
  return file;
}
