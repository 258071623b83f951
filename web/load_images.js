/* Load Images (TI_LoadImages): shows the pictures of the chosen folder as thumbnails, and adds pictures to it. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { after, element, filled } from "./lib/page.js";

const TEXTS = {
  add: "Add pictures",
  addHint: "Add pictures, and text files with captions: cat.txt is the caption of cat.png.",
  none: "Drop pictures here",
  reading: "Reading the folder",
  one: "1 picture",
  count: "{count} pictures",
  adding: "Adding {number} of {count}",
  size: "{width} × {height}",
  masked: "Has a mask: parts of it are transparent.",
  captioned: "Has a caption.",
  noThumbnail: "ComfyUI cannot show this file.",
  path: "Thumbnails are only shown for folders inside ComfyUI's input folder. Clear 'path' to use one.",
  linked: "The folder comes from another node, so its pictures cannot be shown here.",
  skipped: "Skipped, neither a picture nor a caption: {names}.",
  unreadable: "Added, but cannot be read as a picture: {names}.",
  noPicture: "Skipped {name}: there is no picture with that name.",
  captionKept: "Skipped {name}: the picture already has another caption.",
  refused: "ComfyUI refused {name} (error {status}).",
  refusedList: "ComfyUI could not list the folder (error {status}).",
  noResponse: "ComfyUI does not respond: check whether it is still running.",
};

const NODE = "TI_LoadImages";
const NEW_FOLDER = "pictures"; // created for pictures that are added while '.', the input folder itself, is chosen
const SIZE = [340, 500]; // of a new node
const HEIGHT = 200; // least height of the list with its button; also in load_images.css

const isPicture = (file) => file.type.startsWith("image/");
const isCaption = (file) => file.name.toLowerCase().endsWith(".txt");
const stem = (name) => name.replace(/\.[^.]*$/, "");

/** The dropped files, or none if no picture or caption is among them, such as for a workflow. */
function droppedFiles(event) {
  const files = [...(event.dataTransfer?.files ?? [])];
  return files.some((file) => isPicture(file) || isCaption(file)) ? files : [];
}

/** ComfyUI's response. Throws an error whose message is for the user. */
async function ask(route, options) {
  try {
    return await api.fetchApi(route, options);
  } catch {
    throw new Error(TEXTS.noResponse);
  }
}

/** `{pictures, folders}` for a folder inside the input folder. */
async function listPictures(folder) {
  const answer = await ask(`/textual_inversion/pictures?${new URLSearchParams({ folder })}`, { cache: "no-store" });
  if (answer.ok) return await answer.json();
  if (answer.status === 400) throw new Error((await answer.json()).error);
  throw new Error(filled(TEXTS.refusedList, { status: answer.status }));
}

/** Uploads a file into the input folder and returns its name there, which differs if the name was taken. */
async function upload(file, name, folder, overwrite) {
  const body = new FormData();
  body.append("image", file, name);
  body.append("type", "input");
  body.append("subfolder", folder);
  if (overwrite) body.append("overwrite", "true");
  const answer = await ask("/upload/image", { method: "POST", body });
  if (!answer.ok) throw new Error(filled(TEXTS.refused, { name: file.name, status: answer.status }));
  return (await answer.json()).name;
}

class PictureList {
  constructor(node) {
    this.node = node;
    this.tiles = new Map(); // by folder and picture, so that unchanged thumbnails are not fetched again
    this.queue = Promise.resolve(); // of uploads, one after the other
    this.newest = 0; // number of the latest request for the list; responses to older ones are ignored

    this.list = element("div", { className: "ti-pictures-list", tabIndex: 0 });
    this.list.dataset.captureWheel = "true"; // after a click the wheel scrolls the list instead of zooming the canvas
    this.note = element("div", { className: "ti-pictures-note", role: "status", hidden: true });
    this.count = element("span", { className: "ti-pictures-count" });
    this.input = element("input", { type: "file", multiple: true, accept: "image/*,.txt", hidden: true });
    const choose = { type: "button", title: TEXTS.addHint, onclick: () => this.input.click() };
    const plus = element("i", { className: "pi pi-plus" });
    this.button = element("button", { className: "ti-pictures-add", ...choose }, plus, TEXTS.add);
    const foot = element("div", { className: "ti-pictures-foot" }, this.count, this.button, this.input);
    const style = element("link", { rel: "stylesheet", href: new URL("load_images.css", import.meta.url) });
    this.element = element("div", { className: "ti-pictures" }, style, this.list, this.note, foot);
    this.input.onchange = () => {
      this.add([...this.input.files]);
      this.input.value = "";
    };
    this.element.addEventListener("dragover", (event) => {
      event.preventDefault();
      this.element.classList.add("ti-over");
    });
    this.element.addEventListener("dragleave", (event) => {
      if (!this.element.contains(event.relatedTarget)) this.element.classList.remove("ti-over");
    });
    this.element.addEventListener("drop", (event) => {
      this.element.classList.remove("ti-over");
      const files = droppedFiles(event);
      if (!files.length) return;
      event.preventDefault(); // so that ComfyUI does not handle the drop as well
      this.add(files);
    });
  }

  widget(name) {
    return this.node.widgets.find((widget) => widget.name === name);
  }

  get folder() {
    return this.widget("folder").value;
  }

  /** Why pictures can be neither shown nor added, or an empty string. */
  get obstacle() {
    const linked = this.node.inputs?.some(
      (input) => ["folder", "path"].includes(input.widget?.name) && input.link != null,
    );
    if (linked) return TEXTS.linked;
    return this.widget("path").value.trim() ? TEXTS.path : "";
  }

  /** Refreshes after all code that runs now, so that many calls, as while a workflow opens, cause one request. */
  refreshSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.refresh());
  }

  /** Requests the list and shows it, with `note` or an error message below it. */
  async refresh(note = "") {
    clearTimeout(this.timer);
    const turn = ++this.newest;
    const { folder, obstacle } = this;
    this.button.disabled = Boolean(obstacle);
    if (obstacle) return this.show([], folder, obstacle, "", note);
    if (!this.count.textContent) this.count.textContent = TEXTS.reading;
    try {
      const { pictures, folders } = await listPictures(folder);
      if (turn !== this.newest) return;
      this.widget("folder").options.values = folders;
      const count = filled(pictures.length === 1 ? TEXTS.one : TEXTS.count, { count: pictures.length });
      this.show(pictures, folder, TEXTS.none, count, note);
    } catch (error) {
      if (turn === this.newest) this.show([], folder, TEXTS.none, "", note || error.message);
    }
  }

  show(pictures, folder, whenEmpty, count, note) {
    const tiles = new Map();
    for (const picture of pictures) {
      const key = JSON.stringify([folder, picture]);
      tiles.set(key, this.tiles.get(key) ?? makeTile(picture, folder));
    }
    this.tiles = tiles;
    this.list.classList.toggle("ti-empty", !pictures.length);
    if (pictures.length) this.list.replaceChildren(...tiles.values());
    else this.list.replaceChildren(element("i", { className: "pi pi-images" }), whenEmpty);
    this.count.textContent = count;
    this.say(note);
  }

  say(note) {
    this.note.textContent = note;
    this.note.hidden = !note;
  }

  /** Adds pictures and captions to the folder, once earlier uploads are done. */
  add(files) {
    this.queue = this.queue.then(() => this.addNow(files));
  }

  async addNow(files) {
    if (this.obstacle) return this.say(this.obstacle);
    const notes = [];
    const strange = files.filter((file) => !isPicture(file) && !isCaption(file));
    if (strange.length) notes.push(filled(TEXTS.skipped, { names: strange.map((file) => file.name).join(", ") }));
    this.button.disabled = true;
    try {
      notes.push(...(await this.save(files.filter(isPicture), files.filter(isCaption))));
    } catch (error) {
      notes.push(error.message);
    }
    await this.refresh(notes.join(" "));
  }

  /** Uploads pictures, then captions that belong to a picture. Returns messages for the user. */
  async save(pictures, captions) {
    const notes = [];
    const chosen = this.folder;
    const { folders } = await listPictures(chosen);
    const folder = chosen === "." && pictures.length ? freeName(folders) : chosen;
    const subfolder = folder === "." ? "" : folder;
    const names = new Map(); // of the pictures: original name -> name in the folder
    try {
      for (const [index, file] of pictures.entries()) {
        this.count.textContent = filled(TEXTS.adding, { number: index + 1, count: pictures.length });
        names.set(file.name, await upload(file, file.name, subfolder, false));
      }
    } finally {
      if (names.size && folder !== chosen) this.choose(folder, folders);
    }

    const listed = (await listPictures(folder)).pictures;
    const missing = [...names.values()].filter((name) => !listed.some((picture) => picture.name === name));
    if (missing.length) notes.push(filled(TEXTS.unreadable, { names: missing.join(", ") }));
    for (const file of captions) {
      const renamed = [...names].find(([original]) => stem(original) === stem(file.name));
      const wanted = stem(renamed ? renamed[1] : file.name);
      const picture = listed.find(({ name }) => stem(name) === wanted);
      if (!picture) notes.push(filled(TEXTS.noPicture, file));
      else if (!picture.caption) await upload(file, `${wanted}.txt`, subfolder, true); // replaces only empty ones
      else if (picture.caption !== (await file.text()).trim()) notes.push(filled(TEXTS.captionKept, file));
    }
    return notes;
  }

  /** Sets the `folder` widget to a new folder that is not among its options yet. */
  choose(folder, folders) {
    const widget = this.widget("folder");
    widget.options.values = [...folders, folder];
    widget.value = folder;
    widget.callback?.(folder);
    this.node.setDirtyCanvas(true, true);
  }
}

/** `pictures`, or `pictures-2`, `pictures-3` ... if that folder exists. */
function freeName(folders) {
  const taken = new Set(folders.map((folder) => folder.toLowerCase())); // some file systems ignore case
  let name = NEW_FOLDER;
  for (let number = 2; taken.has(name); number++) name = `${NEW_FOLDER}-${number}`;
  return name;
}

function makeTile({ name, caption, modified, width, height, masked }, folder) {
  const image = element("img", { alt: name, loading: "lazy", draggable: false });
  image.src = api.apiURL(`/textual_inversion/thumbnail?${new URLSearchParams({ folder, name, modified })}`);
  const marks = element("div", { className: "ti-marks" });
  const mark = (kind, ariaLabel) => marks.append(element("i", { className: `ti-mark ${kind}`, ariaLabel }));
  if (caption) mark("ti-mark-caption pi pi-align-left", TEXTS.captioned);
  if (masked) mark("ti-mark-mask", TEXTS.masked);
  const hint = [name, filled(TEXTS.size, { width, height }), caption, masked ? TEXTS.masked : ""].filter(Boolean);
  const tile = element("div", { className: "ti-picture", title: hint.join("\n") }, image, marks);
  image.onerror = () => {
    image.replaceWith(element("i", { className: "pi pi-image" }));
    tile.title = [name, TEXTS.noThumbnail].join("\n");
  };
  return tile;
}

const lists = new Set();

app.registerExtension({
  name: "textualinversion.LoadImages",

  setup() {
    // A node without output to show has no event at its end. Files may have changed since the last refresh.
    api.addEventListener("execution_start", () => lists.forEach((list) => list.refreshSoon()));
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const list = new PictureList(node);
    const widget = node.addDOMWidget("pictures", "ti_pictures", list.element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
    });
    widget.serialize = false;
    node.setSize([Math.max(node.size[0], SIZE[0]), Math.max(node.size[1], SIZE[1])]);

    const refresh = () => list.refreshSoon();
    for (const name of ["folder", "path"]) after(list.widget(name), "callback", refresh);
    for (const name of ["onConfigure", "onConnectionsChange", "refreshComboInNode"]) after(node, name, refresh);
    after(node, "onRemoved", () => lists.delete(list));
    node.onDragOver = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file");
    node.onDragDrop = (event) => {
      const files = droppedFiles(event);
      if (files.length) list.add(files);
      return files.length > 0;
    };
    lists.add(list);
    refresh();
  },
});
