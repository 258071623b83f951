/* Load Images (TI_LoadImages): the pictures of the chosen folder as thumbnails, and adding more to it. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { element, filled } from "./lib/page.js";

const WORDS = {
  add: "Add pictures",
  addHint: "Pictures, and text files with their captions: cat.txt belongs to cat.png.",
  none: "Drop pictures here",
  reading: "Reading the folder",
  one: "1 picture",
  count: "{count} pictures",
  adding: "Adding {number} of {count}",
  size: "{width} × {height}",
  masked: "Has a mask: it is transparent in places.",
  captioned: "Has a caption.",
  noThumbnail: "ComfyUI cannot show this file.",
  path: "Thumbnails are shown for folders inside ComfyUI's input folder. Empty 'path' to use one.",
  linked: "The folder comes over a link, so its pictures are not shown here.",
  leftOut: "Neither picture nor caption, left out: {names}.",
  unreadable: "Added, but no picture that can be read: {names}.",
  noPicture: "{name} is left out: there is no picture of that name.",
  captionKept: "{name} is left out: the picture has another caption already.",
  refused: "ComfyUI refused {name} (error {status}).",
  refusedList: "ComfyUI could not list the folder (error {status}).",
  silent: "ComfyUI does not answer: see whether it is still running.",
};

const NODE = "TI_LoadImages";
const NEW_FOLDER = "pictures"; // for pictures dropped while '.', the input folder itself, is chosen
const SIZE = [340, 500]; // of a new node
const HEIGHT = 200; // of the list with its button, at least: load_images.css has it too

const isPicture = (file) => file.type.startsWith("image/");
const isCaption = (file) => file.name.toLowerCase().endsWith(".txt");
const stem = (name) => name.replace(/\.[^.]*$/, "");

/** Pictures and captions among what was dropped; empty when it is something else, a workflow for instance. */
function droppedFiles(event) {
  const files = [...(event.dataTransfer?.files ?? [])];
  return files.some((file) => isPicture(file) || isCaption(file)) ? files : [];
}

/** ComfyUI's answer, or an error whose message is one sentence for the user. */
async function ask(route, options) {
  try {
    return await api.fetchApi(route, options);
  } catch {
    throw new Error(WORDS.silent);
  }
}

/** `{pictures, folders}` of a folder below the input folder. */
async function listPictures(folder) {
  const answer = await ask(`/textual_inversion/pictures?${new URLSearchParams({ folder })}`, { cache: "no-store" });
  if (answer.ok) return await answer.json();
  if (answer.status === 400) throw new Error((await answer.json()).error);
  throw new Error(filled(WORDS.refusedList, { status: answer.status }));
}

/** Saves a file below the input folder and returns its name there: another one where the name was taken. */
async function upload(file, name, folder, overwrite) {
  const body = new FormData();
  body.append("image", file, name);
  body.append("type", "input");
  body.append("subfolder", folder);
  if (overwrite) body.append("overwrite", "true");
  const answer = await ask("/upload/image", { method: "POST", body });
  if (!answer.ok) throw new Error(filled(WORDS.refused, { name: file.name, status: answer.status }));
  return (await answer.json()).name;
}

class PictureList {
  constructor(node) {
    this.node = node;
    this.tiles = new Map(); // by what they show: a thumbnail is not fetched again when the list is
    this.queue = Promise.resolve(); // of additions, one after the other
    this.newest = 0; // the last listing asked for: answers to earlier ones come too late

    this.list = element("div", { className: "ti-pictures-list", tabIndex: 0 });
    this.list.dataset.captureWheel = "true"; // the wheel scrolls the list once it was clicked
    this.note = element("div", { className: "ti-pictures-note", role: "status", hidden: true });
    this.count = element("span", { className: "ti-pictures-count" });
    this.input = element("input", { type: "file", multiple: true, accept: "image/*,.txt", hidden: true });
    const choose = { type: "button", title: WORDS.addHint, onclick: () => this.input.click() };
    const plus = element("i", { className: "pi pi-plus" });
    this.button = element("button", { className: "ti-pictures-add", ...choose }, plus, WORDS.add);
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
      event.preventDefault(); // ComfyUI leaves such a drop alone
      this.add(files);
    });
  }

  widget(name) {
    return this.node.widgets.find((widget) => widget.name === name);
  }

  get folder() {
    return this.widget("folder").value;
  }

  /** Why the folder's pictures cannot be shown, nor more be added; empty when they can. */
  get obstacle() {
    const linked = this.node.inputs?.some(
      (input) => ["folder", "path"].includes(input.widget?.name) && input.link != null,
    );
    if (linked) return WORDS.linked;
    return this.widget("path").value.trim() ? WORDS.path : "";
  }

  /** Reads the folder soon; many calls at once, as when a workflow is opened, are one. */
  refreshSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.refresh());
  }

  /** Reads the folder and shows it, with `note` or what went wrong below. */
  async refresh(note = "") {
    clearTimeout(this.timer);
    const turn = ++this.newest;
    const { folder, obstacle } = this;
    this.button.disabled = Boolean(obstacle);
    if (obstacle) return this.show([], folder, obstacle, "", note);
    if (!this.count.textContent) this.count.textContent = WORDS.reading;
    try {
      const { pictures, folders } = await listPictures(folder);
      if (turn !== this.newest) return;
      this.widget("folder").options.values = folders;
      const count = filled(pictures.length === 1 ? WORDS.one : WORDS.count, { count: pictures.length });
      this.show(pictures, folder, WORDS.none, count, note);
    } catch (error) {
      if (turn === this.newest) this.show([], folder, WORDS.none, "", note || error.message);
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

  /** Adds pictures and captions to the folder, after what is being added already. */
  add(files) {
    this.queue = this.queue.then(() => this.addNow(files));
  }

  async addNow(files) {
    if (this.obstacle) return this.say(this.obstacle);
    const notes = [];
    const strange = files.filter((file) => !isPicture(file) && !isCaption(file));
    if (strange.length) notes.push(filled(WORDS.leftOut, { names: strange.map((file) => file.name).join(", ") }));
    this.button.disabled = true;
    try {
      notes.push(...(await this.save(files.filter(isPicture), files.filter(isCaption))));
    } catch (error) {
      notes.push(error.message);
    }
    await this.refresh(notes.join(" "));
  }

  /** Uploads pictures, then the captions of those there are. Returns what the user should know. */
  async save(pictures, captions) {
    const notes = [];
    const chosen = this.folder;
    const { folders } = await listPictures(chosen);
    const folder = chosen === "." && pictures.length ? freeName(folders) : chosen;
    const subfolder = folder === "." ? "" : folder;
    const names = new Map(); // of the pictures, as they were and as they are called in the folder
    try {
      for (const [index, file] of pictures.entries()) {
        this.count.textContent = filled(WORDS.adding, { number: index + 1, count: pictures.length });
        names.set(file.name, await upload(file, file.name, subfolder, false));
      }
    } finally {
      if (names.size && folder !== chosen) this.choose(folder, folders);
    }

    const listed = (await listPictures(folder)).pictures;
    const missing = [...names.values()].filter((name) => !listed.some((picture) => picture.name === name));
    if (missing.length) notes.push(filled(WORDS.unreadable, { names: missing.join(", ") }));
    for (const file of captions) {
      const renamed = [...names].find(([original]) => stem(original) === stem(file.name));
      const wanted = stem(renamed ? renamed[1] : file.name);
      const picture = listed.find(({ name }) => stem(name) === wanted);
      if (!picture) notes.push(filled(WORDS.noPicture, file));
      else if (!picture.caption) await upload(file, `${wanted}.txt`, subfolder, true); // at most an empty one is there
      else if (picture.caption !== (await file.text()).trim()) notes.push(filled(WORDS.captionKept, file));
    }
    return notes;
  }

  /** Sets the `folder` widget to one that did not exist when ComfyUI listed the choices. */
  choose(folder, folders) {
    const widget = this.widget("folder");
    widget.options.values = [...folders, folder];
    widget.value = folder;
    widget.callback?.(folder);
    this.node.setDirtyCanvas(true, true);
  }
}

/** `pictures`, or with the first number that makes it a new folder. */
function freeName(folders) {
  const taken = new Set(folders.map((folder) => folder.toLowerCase())); // as file systems may see it
  let name = NEW_FOLDER;
  for (let number = 2; taken.has(name); number++) name = `${NEW_FOLDER}-${number}`;
  return name;
}

function makeTile({ name, caption, modified, width, height, masked }, folder) {
  const image = element("img", { alt: name, loading: "lazy", draggable: false });
  image.src = api.apiURL(`/textual_inversion/thumbnail?${new URLSearchParams({ folder, name, modified })}`);
  const marks = element("div", { className: "ti-marks" });
  const mark = (kind, ariaLabel) => marks.append(element("i", { className: `ti-mark ${kind}`, ariaLabel }));
  if (caption) mark("ti-mark-caption pi pi-align-left", WORDS.captioned);
  if (masked) mark("ti-mark-mask", WORDS.masked);
  const hint = [name, filled(WORDS.size, { width, height }), caption, masked ? WORDS.masked : ""].filter(Boolean);
  const tile = element("div", { className: "ti-picture", title: hint.join("\n") }, image, marks);
  image.onerror = () => {
    image.replaceWith(element("i", { className: "pi pi-image" }));
    tile.title = [name, WORDS.noThumbnail].join("\n");
  };
  return tile;
}

/** Calls `more` after what a node or widget does at `name`. */
function after(object, name, more) {
  const first = object[name];
  object[name] = function (...values) {
    const result = first?.apply(this, values);
    more();
    return result;
  };
}

const lists = new Set();

app.registerExtension({
  name: "textualinversion.LoadImages",

  setup() {
    // ComfyUI tells the end of a node only where the node shows something; files may have changed since.
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
