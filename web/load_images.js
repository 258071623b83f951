/* Load Images (TI_LoadImages): shows the pictures of the chosen folder, adds some, and changes them one by one. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { brought, captionStem, folderOf, isCaption, isPicture, partsOf, stem } from "./lib/dropped_files.js";
import { showFullSize } from "./lib/full_size.js";
import { after, element, filled } from "./lib/page.js";
import { PictureRequests, Refused, thumbnail } from "./lib/picture_requests.js";
import { texts } from "./lib/texts.js";

const TEXTS = await texts("pictures");

const NODE = "TI_LoadImages";
const NEW_FOLDER = "pictures"; // made for pictures that are added while no folder of their own is chosen
const SIZE = [340, 500]; // of a new node
const HEIGHT = 200; // least height of the list with its buttons; also in load_images.css
const NOTHING = { pictures: [], concepts: [], left_out: [] };
const NAMED = 5; // files left out that are named, at most

const requests = new PictureRequests(TEXTS);

class PictureList {
  constructor(node) {
    this.node = node;
    this.tiles = new Map(); // by folder and picture, so that unchanged thumbnails are not fetched again
    this.concepts = []; // of a folder of folders
    this.leftOut = []; // {name, reason}
    this.queue = Promise.resolve(); // of uploads and other changes, one after the other
    this.newest = 0; // number of the latest request for the list; responses to older ones are ignored

    this.list = element("div", { className: "ti-pictures-list", tabIndex: 0 });
    this.list.dataset.captureWheel = "true"; // after a click the wheel scrolls the list instead of zooming the canvas
    this.note = element("div", { className: "ti-pictures-note", role: "status", hidden: true });
    this.count = element("span", { className: "ti-pictures-count" });
    this.input = element("input", { type: "file", multiple: true, accept: "image/*,.heic,.txt,.caption", hidden: true });
    this.newFolder = button("folder-plus", "", TEXTS.newFolderHint, () => this.nameFolder());
    this.newFolder.ariaLabel = TEXTS.newFolder;
    this.button = button("plus", TEXTS.add, TEXTS.addHint, () => this.input.click());
    const foot = element("div", { className: "ti-pictures-foot" }, this.count, this.newFolder, this.button, this.input);
    const style = element("link", { rel: "stylesheet", href: new URL("load_images.css", import.meta.url) });
    this.element = element("div", { className: "ti-pictures ti-colours" }, style, this.list, this.note, foot);
    this.input.onchange = () => {
      this.add({ files: [...this.input.files], folders: [] });
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
      const things = brought(event.dataTransfer);
      if (!things) return;
      event.preventDefault(); // so that ComfyUI does not handle the drop as well
      this.add(things);
    });
    this.element.addEventListener("paste", (event) => {
      const things = event.target.matches("textarea") ? null : brought(event.clipboardData);
      if (!things) return;
      event.preventDefault();
      event.stopPropagation(); // so that ComfyUI does not paste it as well
      this.add(things);
    });
  }

  widget(name) {
    return this.node.widgets.find((widget) => widget.name === name);
  }

  /** What the widgets name, as the server is asked for it. */
  get place() {
    return { folder: this.widget("folder").value, path: this.widget("path").value.trim() };
  }

  /** Why pictures cannot be shown, or an empty string. */
  get hidden() {
    const linked = this.node.inputs?.some(
      (input, slot) => ["folder", "path"].includes(input.widget?.name) && this.node.isInputConnected(slot),
    );
    return linked ? TEXTS.linked : "";
  }

  /** Why pictures can be neither added nor changed, or an empty string. */
  get fixed() {
    return this.hidden || (this.place.path ? TEXTS.path : "");
  }

  /** Refreshes after all code that runs now, so that many calls, as while a workflow opens, cause one request. */
  refreshSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.refresh());
  }

  /** Requests the list and shows it, with `notes` or an error message below it. */
  async refresh(notes = []) {
    clearTimeout(this.timer);
    const turn = ++this.newest;
    const { place, hidden } = this;
    this.button.disabled = this.newFolder.disabled = Boolean(this.fixed);
    this.button.title = this.fixed || TEXTS.addHint;
    if (hidden) return this.show(NOTHING, place, hidden, notes);
    if (!this.count.textContent) this.count.textContent = TEXTS.reading;
    try {
      const found = await requests.list(place);
      if (turn !== this.newest) return;
      this.offer(found.folders);
      this.show(found, place, TEXTS.none, notes);
    } catch (error) {
      if (turn !== this.newest) return;
      this.show(NOTHING, place, TEXTS.none, notes.length ? notes : [error.message]);
    }
  }

  /** Offers these folders in the widget, and one that is named already but not made. */
  offer(folders) {
    const { folder } = this.place;
    const all = ["", ...folders];
    this.widget("folder").options.values = all.includes(folder) ? all : [...all, folder];
  }

  show({ pictures, concepts, left_out: leftOut }, place, whenEmpty, notes) {
    const tiles = new Map();
    const add = (kind, shown) => {
      const key = JSON.stringify([place, shown]);
      tiles.set(key, this.tiles.get(key) ?? new kind(this, shown, place));
    };
    pictures.forEach((picture) => add(Tile, picture));
    concepts.forEach((concept) => add(ConceptTile, concept));
    this.tiles = tiles;
    this.concepts = concepts;
    this.leftOut = leftOut;
    this.notes = notes;
    this.list.classList.toggle("ti-empty", !tiles.size);
    if (tiles.size) this.list.replaceChildren(...[...tiles.values()].map((tile) => tile.element));
    else this.list.replaceChildren(element("i", { className: "pi pi-images" }), whenEmpty);
    this.count.textContent = this.hidden ? "" : countText(pictures, concepts);
    this.say();
  }

  /** Shows the notes, and which files are left out and why. */
  say() {
    const broken = [...this.tiles.values()].filter((tile) => tile.reason);
    const leftOut = [...this.leftOut, ...broken.map((tile) => ({ name: tile.picture.name, reason: tile.reason }))];
    const lines = leftOut.slice(0, NAMED).map(leftOutLine);
    if (leftOut.length > NAMED) lines.push(filled(TEXTS.more, { count: leftOut.length - NAMED }));
    this.note.textContent = [...this.notes, ...lines].join("\n");
    this.note.hidden = !this.note.textContent;
  }

  /** What a run has left out: files whose damage is only found when they are read to their end. */
  ran(leftOut) {
    if (this.hidden || this.concepts.length) this.leftOut = leftOut;
    else {
      for (const tile of this.tiles.values()) {
        tile.reason = leftOut.find(({ name }) => name === tile.picture.name)?.reason ?? "";
      }
    }
    this.say();
  }

  /** Asks for the name of a new folder and chooses it; it is made when pictures are added. */
  async nameFolder() {
    const question = { title: TEXTS.newFolder, message: TEXTS.newFolderQuestion, defaultValue: "" };
    const name = await app.extensionManager.dialog.prompt(question);
    if (name?.trim()) this.choose(name.trim());
  }

  /** Sets the `folder` widget to a folder that may not be among its options. */
  choose(folder) {
    const widget = this.widget("folder");
    const { values } = widget.options;
    if (!values.includes(folder)) widget.options.values = [...values, folder];
    widget.value = folder;
    widget.callback?.(folder);
    this.node.setDirtyCanvas(true, true);
  }

  /** Adds pictures and captions to the folder, once earlier uploads are done. */
  add(things) {
    this.queue = this.queue.then(() => this.addNow(things));
  }

  async addNow({ files, folders }) {
    if (this.fixed) return this.refresh([this.fixed]);
    this.button.disabled = true;
    const notes = [];
    try {
      const parts = [{ name: "", files }, ...(await Promise.all(folders.map(partsOf))).flat()];
      const strange = parts.flatMap((part) => part.files).filter((file) => !isPicture(file) && !isCaption(file));
      if (strange.length) notes.push(filled(TEXTS.skipped, { names: strange.map((file) => file.name).join(", ") }));
      const name = folders.length === 1 && !files.length ? folders[0].name : NEW_FOLDER;
      notes.push(...(await this.save(parts, name)));
    } catch (error) {
      notes.push(error.message);
    }
    await this.refresh(notes);
  }

  /** Uploads pictures, then captions that belong to a picture: each part into the folder of its name in the chosen one. */
  async save(parts, newFolder) {
    const notes = [];
    const picturesOf = ({ files }) => files.filter((file) => isPicture(file) && !isCaption(file));
    const count = parts.flatMap(picturesOf).length;
    const chosen = this.place.folder;
    const { folders } = await requests.list({ folder: chosen });
    const folder = ["", "."].includes(chosen) && count ? freeName(newFolder, folders) : chosen;
    const names = new Map(parts.map((part) => [part, new Map()])); // of pictures: file -> name in the folder
    const target = ({ name }) => (name ? `${folder}/${name}` : folder);
    let number = 0;
    try {
      for (const [part, file] of parts.flatMap((one) => picturesOf(one).map((picture) => [one, picture]))) {
        this.count.textContent = filled(TEXTS.adding, { number: ++number, count });
        try {
          names.get(part).set(file, await requests.add(target(part), file));
        } catch (error) {
          if (!(error instanceof Refused)) throw error;
          notes.push(leftOutLine({ name: file.name, reason: error.message }));
        }
      }
    } finally {
      if ([...names.values()].some(({ size }) => size) && folder !== chosen) this.choose(folder);
    }
    for (const part of parts) {
      const captions = part.files.filter(isCaption);
      if (!captions.length || (part.name && !names.get(part).size)) continue; // no picture of this folder was taken
      const listed = (await requests.list({ folder: target(part) })).pictures;
      const added = names.get(part);
      captions.sort((a, b) => Boolean(beside(b, added)) - Boolean(beside(a, added))); // the others take what is left
      for (const file of captions) notes.push(...(await saveCaption(file, target(part), added, listed)));
    }
    return notes;
  }

  /** Shows one of the pictures in a place in full size, with its caption to be written. */
  enlarge(shown, at, place) {
    const pictures = shown.map((picture) => ({
      picture,
      src: thumbnail(place, picture, "large"),
      title: picture.name,
    }));
    let save = () => {};
    const below = ({ picture }, dialog) => {
      save(); // the caption of the picture before
      const about = [picture.name, filled(TEXTS.size, picture), picture.masked ? TEXTS.masked : ""].filter(Boolean);
      const line = element("div", { textContent: about.join(", ") });
      const text = element("textarea", { value: picture.caption, placeholder: TEXTS.caption, rows: 3 });
      text.readOnly = Boolean(this.fixed);
      const before = text.value; // with line ends of its own
      save = () => text.value !== before && this.writeCaption(picture, text.value, place);
      if (this.fixed) return [line, text];
      const remove = async () => {
        dialog.close();
        await this.remove(picture, place);
      };
      return [line, text, button("trash", TEXTS.remove, "", remove)];
    };
    showFullSize(this.element, pictures, at, below).addEventListener("close", () => save());
  }

  writeCaption(picture, caption, { folder }) {
    if (this.fixed || caption.trim() === picture.caption) return;
    picture.caption = caption.trim(); // so that it is written once
    this.change(() => requests.writeCaption(folder, picture.name, caption));
  }

  /** Deletes a picture and its caption after the user has agreed. */
  async remove({ name, caption_file: caption }, { folder }) {
    const message = filled(TEXTS.removeQuestion, { folder: folder === "." ? "input" : folder });
    const itemList = caption ? [name, caption] : [name];
    const agreed = await app.extensionManager.dialog.confirm({ title: TEXTS.remove, message, itemList, type: "delete" });
    if (agreed) this.change(() => requests.remove(folder, name));
  }

  /** Makes a change once earlier ones are done, and refreshes with what the server says against it. */
  change(request) {
    this.queue = this.queue.then(request).then(
      () => this.refresh(),
      (error) => this.refresh([error.message]),
    );
  }
}

/** A thumbnail in the list. `reason` says why its picture cannot be used, if so. */
class Tile {
  constructor(list, picture, place) {
    Object.assign(this, { list, picture, place, reason: "" });
    const { name, caption, masked } = picture;
    const image = thumbnailOf(this, picture, place);
    const marks = element("div", { className: "ti-marks" });
    const mark = (kind, ariaLabel) => marks.append(element("i", { className: `ti-mark ${kind}`, ariaLabel }));
    if (caption) mark("ti-mark-caption pi pi-align-left", TEXTS.captioned);
    if (masked) mark("ti-mark-mask", TEXTS.masked);
    const open = element("button", { type: "button", className: "ti-open" }, image, marks);
    open.onclick = () => {
      const tiles = [...list.tiles.values()];
      list.enlarge(tiles.map((tile) => tile.picture), tiles.indexOf(this), place);
    };
    open.title = [name, filled(TEXTS.size, picture), caption, masked ? TEXTS.masked : "", TEXTS.open]
      .filter(Boolean)
      .join("\n");
    this.element = element("div", { className: "ti-picture" }, open);
    if (list.fixed) return;
    const remove = button("times", "", `${TEXTS.remove}: ${name}`, () => list.remove(picture, place));
    remove.classList.add("ti-remove");
    this.element.append(remove);
  }
}

/** The first picture of a concept, with its name and the number of its pictures; a click opens all of them. */
class ConceptTile {
  constructor(list, { name, place, pictures }) {
    const [picture] = pictures;
    Object.assign(this, { list, picture: { ...picture, name: `${name}/${picture.name}` }, reason: "" });
    const label = element("div", { className: "ti-concept" }, element("span", { textContent: name }));
    label.append(element("b", { textContent: pictures.length }));
    const image = thumbnailOf(this, picture, place);
    const open = element("button", { type: "button", className: "ti-open" }, image, label);
    open.onclick = () => list.enlarge(pictures, 0, place);
    open.title = open.ariaLabel = `${name}: ${countText(pictures)}`;
    this.element = element("div", { className: "ti-picture" }, open);
  }
}

/** The image of a tile, which learns why there is none. */
function thumbnailOf(tile, picture, place) {
  const image = element("img", { alt: picture.name, loading: "lazy", draggable: false });
  image.src = thumbnail(place, picture, "small");
  image.onerror = async () => {
    image.replaceWith(element("i", { className: "pi pi-image" }));
    tile.reason = await requests.whyNot(image.src);
    tile.list.say();
  };
  return image;
}

/** Makes a dropped text the caption of its picture. Returns messages for the user. */
async function saveCaption(file, folder, added, listed) {
  const named = [...added].filter(([picture]) => belongs(file, picture.name));
  const own = beside(file, added) ?? (named.length === 1 ? named[0] : undefined); // captions may be in a folder apart
  const picture = listed.find(({ name }) => (named.length ? name === own?.[1] : belongs(file, name)));
  if (!picture) return [filled(TEXTS.noPicture, file)];
  if (picture.caption) {
    return picture.caption === (await file.text()).trim() ? [] : [filled(TEXTS.captionKept, file)];
  }
  try {
    await requests.writeCaption(folder, picture.name, file);
    return [];
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return [leftOutLine({ name: file.name, reason: error.message })];
  }
}

/** Whether a caption is called like a picture: cat.txt, or cat.png.txt, like cat.png. */
function belongs(caption, name) {
  return [name, stem(name)].map(composed).includes(composed(captionStem(caption.name)));
}

/** The picture that was dropped from the same folder as a caption, and its name now. */
function beside(caption, added) {
  return [...added].find(([file]) => belongs(caption, file.name) && folderOf(file) === folderOf(caption));
}

/** With accents as parts of their letters: names from a Mac have them as characters of their own. */
const composed = (name) => name.normalize("NFC");

/** That a file is left out, and why; a reason may be a sentence with a full stop of its own. */
function leftOutLine({ name, reason }) {
  return filled(TEXTS.leftOut, { name, reason: reason.replace(/\.$/, "") });
}

function button(icon, text, title, onclick) {
  const sign = element("i", { className: `pi pi-${icon}` });
  return element("button", { type: "button", className: "ti-button", title, onclick }, sign, text);
}

function countText(pictures, concepts = []) {
  if (concepts.length) {
    const all = countText(concepts.flatMap((concept) => concept.pictures));
    return filled(concepts.length === 1 ? TEXTS.oneConcept : TEXTS.concepts, { count: concepts.length, pictures: all });
  }
  const count = filled(pictures.length === 1 ? TEXTS.one : TEXTS.count, { count: pictures.length });
  const captions = pictures.filter(({ caption }) => caption).length;
  return captions ? filled(TEXTS.captions, { pictures: count, captions }) : count;
}

/** The name, or name-2, name-3 ... if that folder exists. */
function freeName(wanted, folders) {
  const taken = new Set(folders.map((folder) => folder.toLowerCase())); // some file systems ignore case
  let name = wanted;
  for (let number = 2; taken.has(name.toLowerCase()); number++) name = `${wanted}-${number}`;
  return name;
}

const lists = new Set();

app.registerExtension({
  name: "textualinversion.LoadImages",

  setup() {
    api.addEventListener("execution_start", () => lists.forEach((list) => list.refreshSoon())); // files may have changed
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const list = new PictureList(node);
    const widget = node.addDOMWidget("pictures", "ti_pictures", list.element, {
      serialize: false,
      hideOnZoom: false,
      hideInPanel: true, // it has no value to set
      getMinHeight: () => HEIGHT,
    });
    widget.serialize = false;
    node.setSize([Math.max(node.size[0], SIZE[0]), Math.max(node.size[1], SIZE[1])]);
    const folder = list.widget("folder");
    folder.value = ""; // ComfyUI would begin with the first folder there is
    folder.options.getOptionLabel = (value) => value || TEXTS.newFolder;
    folder.options.placeholder = TEXTS.newFolder;

    const refresh = () => list.refreshSoon();
    for (const name of ["folder", "path"]) after(list.widget(name), "callback", refresh);
    for (const name of ["onConfigure", "onConnectionsChange", "refreshComboInNode"]) after(node, name, refresh);
    after(node, "onExecuted", ({ left_out: leftOut }) => list.ran(leftOut ?? []));
    after(node, "onRemoved", () => lists.delete(list));
    node.onDragOver = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file");
    node.onDragDrop = (event) => {
      const things = brought(event.dataTransfer);
      if (things) list.add(things);
      return Boolean(things);
    };
    node.previewMediaType = "image"; // ComfyUI hands what is pasted to a selected node of this type
    node.pasteFiles = (files) => list.add({ files, folders: [] });
    lists.add(list);
    refresh();
  },
});
