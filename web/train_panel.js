// The live panel of the Train node: progress, loss, preview pictures, and two buttons.
//
// The server sends the complete record of a run with every event, so the panel always shows the latest record: from
// an event, from the list of runs after a page load, or from the node's output if ComfyUI had cached the run.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { showFullSize } from "./lib/full_size.js";
import { LossChart } from "./lib/loss_chart.js";
import { element, filled } from "./lib/page.js";

const TEXTS = {
  hint: "The loss and the preview pictures appear here during training.",
  encoding: "Encoding pictures",
  searching: "Searching for the best initializer",
  learning: "Training: step {step} of at most {steps}",
  finishing: "Finishing after {step} steps",
  done: "Done after {step} steps",
  cancelled: "Cancelled at step {step}",
  failed: "Failed at step {step}",
  rate: "{rate} pictures/s",
  left: "at least {time} left",
  hours: "{hours} h {minutes} min",
  minutes: "{minutes} min {seconds} s",
  seconds: "{seconds} s",
  waiting: "the embedding waits for the per-image tokens",
  improving: "improving",
  flat: "no progress in {count} evaluations",
  flatOnce: "no progress in the last evaluation",
  best: "best at step {step}",
  learningRate: "learning rate {rate}",
  stop: "Stop and keep",
  stopHelp: "Stop training now. The workflow continues with the best vectors so far.",
  preview: "Preview now",
  previewHelp: "Draw a preview picture with the current vectors.",
  refused: "ComfyUI did not accept this. The run may have ended.",
  lost: "ComfyUI was restarted. Queue the workflow again to resume.",
  pictureStep: "step {step}",
  chart: { fixed: "loss on fixed noise", training: "training loss", step: "step {step}" },
};

const EVENT = "textual_inversion.run";
const ACTIVE = ["encoding", "searching", "learning", "finishing"];
const STOPPABLE = ["searching", "learning"];
const HEIGHTS = { hint: 20, run: 212, pictures: 92 };
const MARGIN = 10;

const panels = new WeakMap(); // node -> TrainPanel
const records = new Map(); // workflow and node -> latest record, in order of arrival

app.registerExtension({
  name: "textualinversion.TrainPanel",

  async setup() {
    api.addEventListener(EVENT, ({ detail }) => keep(detail));
    api.addEventListener("reconnected", askForRuns);
    await askForRuns();
  },

  nodeCreated(node) {
    if (node.comfyClass === "TI_Train") panels.set(node, new TrainPanel(node));
  },

  /** Called after every load, undo and change of tab, which create all nodes again. */
  afterConfigureGraph() {
    records.forEach(show);
  },
});

/** Fetches the runs of the server. Active runs that it does not know ended when it was restarted. */
async function askForRuns() {
  const answer = await api.fetchApi("/textual_inversion/runs");
  const runs = await answer.json();
  const known = new Set(runs.map((record) => record.run));
  for (const record of [...records.values()]) {
    if (ACTIVE.includes(record.state) && !known.has(record.run)) {
      keep({ ...record, state: "failed", message: TEXTS.lost });
    }
  }
  runs.forEach(keep);
}

function keep(record) {
  const key = `${record.workflow} ${record.node}`;
  records.delete(key);
  records.set(key, record);
  show(record);
}

function show(record) {
  if (record.workflow === app.rootGraph.id) panels.get(nodeAt(record.node))?.show(record);
}

/** The node with this execution id: "7:3" is node 3 in the subgraph of node 7. */
function nodeAt(executionId) {
  const path = executionId.split(":");
  const id = path.pop();
  let graph = app.rootGraph;
  for (const step of path) graph = graph?.getNodeById(step)?.subgraph;
  return graph?.getNodeById(id);
}

class TrainPanel {
  constructor(node) {
    this.node = node;
    this.asked = {}; // the latest request of each button

    this.hint = element("div", { className: "ti-hint", textContent: TEXTS.hint });
    this.state = element("div", { className: "ti-line ti-state" });
    this.details = element("div", { className: "ti-line" });
    this.message = element("div", { className: "ti-message" });
    this.chart = new LossChart(TEXTS.chart);
    this.strip = new FilmStrip();
    this.stop = this.button("stop", TEXTS.stop, TEXTS.stopHelp);
    this.preview = this.button("preview", TEXTS.preview, TEXTS.previewHelp);
    const buttons = element("div", { className: "ti-buttons" }, this.stop, this.preview);
    const lines = element("div", {}, this.state, this.details, this.message);
    this.run = element("div", { className: "ti-run" }, lines, this.chart.root, this.strip.root, buttons);
    const style = element("link", { rel: "stylesheet", href: new URL("train_panel.css", import.meta.url) });
    this.root = element("div", { className: "ti-train ti-colours" }, style, this.hint, this.run);
    leaveToCanvas(this.root, this.strip.root);

    this.run.hidden = true;
    const widget = node.addDOMWidget("training", "ti_train_panel", this.root, {
      serialize: false,
      margin: MARGIN,
      getMinHeight: () => this.height + 2 * MARGIN,
      getMaxHeight: () => (this.record ? undefined : this.height + 2 * MARGIN),
    });
    widget.serialize = false;
    this.setHeight(HEIGHTS.hint);

    const onExecuted = node.onExecuted;
    node.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      message.textual_inversion?.forEach((record) => panels.get(this).show(record));
    };
  }

  button(action, label, help) {
    const onclick = async () => {
      this.asked[action] = this.asking(action);
      this.enable();
      const answer = await api.fetchApi(`/textual_inversion/runs/${this.record.run}/${action}`, { method: "POST" });
      if (answer.ok) return;
      app.extensionManager.toast.add({ severity: "warn", summary: label, detail: TEXTS.refused, life: 5000 });
    };
    return element("button", { type: "button", textContent: label, title: help, onclick });
  }

  /** What a click requests now: the end of this run, or one more picture. The same request is not sent twice. */
  asking(action) {
    return action === "stop" ? this.record.run : `${this.record.run} ${this.record.pictures.length}`;
  }

  enable() {
    for (const action of ["stop", "preview"]) {
      this[action].disabled = !STOPPABLE.includes(this.record.state) || this.asked[action] === this.asking(action);
    }
  }

  show(record) {
    this.record = record;
    this.hint.hidden = true;
    this.run.hidden = false;
    this.run.dataset.state = record.state;
    setText(this.state, stateText(record));
    setText(this.details, detailText(record));
    setText(this.message, record.message);
    this.chart.show(record, ACTIVE.includes(record.state));
    this.strip.show(record);
    this.enable();
    this.setHeight(HEIGHTS.run + (record.pictures.length ? HEIGHTS.pictures : 0));
    this.node.graph?.setDirtyCanvas(true, false);
  }

  /** Sets the minimum height: the canvas asks the widget for it, Vue nodes read it from the style. */
  setHeight(height) {
    if (height === this.height) return;
    this.height = height;
    this.root.style.minHeight = `${height}px`;
    const [width, before] = this.node.size;
    this.node.setSize([width, Math.max(before, this.node.computeSize()[1])]);
  }
}

/** The preview pictures in a row. A click shows one in full size. */
class FilmStrip {
  constructor() {
    this.root = element("div", { className: "ti-strip" });
    this.run = "";
  }

  show(record) {
    if (this.run !== record.run) this.root.replaceChildren();
    this.run = record.run;
    const { scrollLeft, scrollWidth, clientWidth } = this.root;
    const atEnd = scrollLeft + clientWidth >= scrollWidth - 1;
    const added = record.pictures.slice(this.root.childElementCount).map((picture) => this.frame(picture));
    this.root.append(...added);
    this.root.hidden = record.pictures.length === 0;
    if (added.length && atEnd) this.root.scrollLeft = this.root.scrollWidth;
  }

  frame({ step, filename, subfolder, type }) {
    const src = api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
    const label = filled(TEXTS.pictureStep, { step });
    const image = element("img", { src, alt: label, draggable: false });
    const frame = element("button", { type: "button", title: label }, image, element("span", { textContent: label }));
    frame.onclick = () => {
      const frames = [...this.root.children];
      const pictures = frames.map(({ title, firstChild }) => ({ title, src: firstChild.src }));
      showFullSize(this.root.closest(".ti-train"), pictures, frames.indexOf(frame));
    };
    return frame;
  }
}

/** Passes wheel and middle button on to the canvas, as text fields of a node do. Sideways, the strip scrolls. */
function leaveToCanvas(root, strip) {
  root.addEventListener("wheel", (event) => {
    const sideways = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY);
    event.stopPropagation();
    if (sideways && strip.contains(event.target) && strip.scrollWidth > strip.clientWidth) return;
    event.preventDefault();
    app.canvas.processMouseWheel(event);
  });
  const middle = (event) => event.button === 1 || event.buttons & 4;
  root.addEventListener("pointerdown", (event) => middle(event) && app.canvas.processMouseDown(event));
  root.addEventListener("pointermove", (event) => middle(event) && app.canvas.processMouseMove(event));
  root.addEventListener("pointerup", (event) => middle(event) && app.canvas.processMouseUp(event));
}

function stateText({ state, step, steps, rate, seconds_left: secondsLeft }) {
  const parts = [filled(TEXTS[state], { step, steps })];
  if (state === "learning" && rate > 0) parts.push(filled(TEXTS.rate, { rate: rate.toPrecision(3) }));
  if (state === "learning" && secondsLeft > 0) parts.push(filled(TEXTS.left, { time: duration(secondsLeft) }));
  return parts.join(", ");
}

function detailText({ state, best, learning_rate: rate, fixed, trend, flat }) {
  const parts = [];
  if (state === "learning") parts.push(filled(TEXTS[trend === "flat" && flat === 1 ? "flatOnce" : trend], { count: flat }));
  if (fixed.length) parts.push(filled(TEXTS.best, { step: best }));
  if (state === "learning" && rate > 0) parts.push(filled(TEXTS.learningRate, { rate: Number(rate.toPrecision(2)) }));
  return parts.join(", ");
}

function duration(total) {
  const seconds = Math.round(total);
  if (seconds < 60) return filled(TEXTS.seconds, { seconds });
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return filled(TEXTS.minutes, { minutes, seconds: seconds % 60 });
  return filled(TEXTS.hours, { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
}

function setText(line, text) {
  line.textContent = line.title = text;
}
