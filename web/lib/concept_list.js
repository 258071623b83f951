// The concepts of a run in a list that scrolls inside: state, trigger word and how far each is. A record changes one
// row and the summary, so the list stays quick with hundreds of concepts.

import { element, filled } from "./page.js";

const ROW = 20; // height in pixels; also in train_panel.css
const MOST_ROWS = 5; // in sight
const AROUND = 38; // height of the line above, the gap below and borders
const MARKS = { waiting: "waiting", done: "done", cancelled: "cancelled", failed: "failed" }; // the rest is "learning"

export class ConceptList {
  /** `texts` are panel.concepts of main.json; `stopAll` is a button; `pick` is called with the record that is chosen. */
  constructor(texts, stopAll, pick) {
    this.texts = texts;
    this.pick = pick;
    this.summary = element("span", { className: "ti-summary" });
    this.list = element("div", { className: "ti-concepts", role: "listbox", ariaLabel: texts.title, tabIndex: 0 });
    this.list.dataset.captureWheel = "true"; // after a click the wheel scrolls the list instead of zooming the canvas
    this.list.onkeydown = (event) => this.press(event);
    const head = element("div", { className: "ti-group" }, this.summary, stopAll);
    this.root = element("div", { className: "ti-several" }, head, this.list);
    this.clear();
  }

  clear() {
    this.rows = new Map(); // by run, in their order
    this.counts = new Map(); // of the concepts in each state
    this.selected = null;
    this.root.hidden = true;
    this.list.replaceChildren();
  }

  /** How many concepts are in this state. */
  count(state) {
    return this.counts.get(state) ?? 0;
  }

  /** 0 where there are no concepts. */
  get height() {
    return this.rows.size && AROUND + ROW * Math.min(this.rows.size, MOST_ROWS);
  }

  /** Shows the latest record of a concept. */
  update(record) {
    const row = this.rows.get(record.run) ?? this.add(record.run);
    if (row.record) this.counts.set(row.record.state, this.count(row.record.state) - 1);
    this.counts.set(record.state, this.count(record.state) + 1);
    row.show(record, this.texts);
    const parts = [filled(this.texts.summary, { done: this.count("done"), count: this.rows.size })];
    if (this.count("failed")) parts.push(filled(this.texts.failures, { count: this.count("failed") }));
    set(this.summary, "textContent", parts.join(", "));
  }

  add(run) {
    const row = new Row(run);
    row.root.onclick = () => this.pick(row.record);
    this.rows.set(run, row);
    this.list.append(row.root);
    this.list.style.height = `${ROW * Math.min(this.rows.size, MOST_ROWS)}px`;
    this.root.hidden = false;
    return row;
  }

  /** Marks the concept that is shown, and brings it into sight. */
  select({ run }) {
    const row = this.rows.get(run);
    if (!row || row === this.selected) return;
    if (this.selected) this.selected.root.ariaSelected = "false";
    row.root.ariaSelected = "true";
    this.selected = row;
    this.list.setAttribute("aria-activedescendant", row.root.id);
    const top = ROW * this.index;
    const { scrollTop, clientHeight } = this.list;
    if (top < scrollTop) this.list.scrollTop = top;
    else if (top + ROW > scrollTop + clientHeight) this.list.scrollTop = top + ROW - clientHeight;
  }

  get index() {
    return [...this.rows.values()].indexOf(this.selected);
  }

  /** The arrow keys choose the next concept; Enter stays with the one that is shown. */
  press(event) {
    const at = this.index;
    const last = this.rows.size - 1;
    const moves = { Enter: at, " ": at, ArrowUp: at - 1, ArrowDown: at + 1, Home: 0, End: last };
    const pages = { PageUp: at - MOST_ROWS, PageDown: at + MOST_ROWS };
    const next = { ...moves, ...pages }[event.key];
    if (next === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation(); // otherwise ComfyUI's shortcuts react to it
    this.pick([...this.rows.values()][Math.min(last, Math.max(0, next))].record);
  }
}

class Row {
  constructor(run) {
    this.mark = element("span", { className: "ti-sign", role: "img" });
    this.name = element("span", { className: "ti-name" });
    this.figure = element("span", { className: "ti-figure" });
    this.root = element("div", { id: `ti-concept-${run}`, role: "option", ariaSelected: "false" });
    this.root.append(this.mark, this.name, this.figure);
  }

  show(record, texts) {
    this.record = record;
    const mark = MARKS[record.state] ?? "learning";
    set(this.root.dataset, "mark", mark);
    set(this.mark, "ariaLabel", texts[mark]);
    set(this.mark, "title", texts[mark]);
    set(this.name, "textContent", record.concept);
    set(this.name, "title", record.concept);
    set(this.figure, "textContent", figure(record, texts));
  }
}

/** What a concept has gained once it is done; until then its step. */
function figure({ state, step, best, fixed }, texts) {
  const [, after] = fixed.find(([at]) => at === best) ?? [];
  if (state === "done" && fixed[0]?.[1] && after != null) {
    const percent = (after / fixed[0][1] - 1).toLocaleString(undefined, { style: "percent", signDisplay: "exceptZero" });
    return filled(texts.gain, { percent });
  }
  return step ? filled(texts.step, { step }) : "";
}

/** Writes to the page only what has changed. */
function set(place, name, value) {
  if (place[name] !== value) place[name] = value;
}
