// The live panel of the Train node: progress, loss, preview pictures, and two buttons. Where a run has several concepts,
// a list of them stands above, and the rest is about one of them.
//
// The server sends the complete record of a run with every event, one for each concept, so the panel always shows the
// latest record: from an event, from the list of runs after a page load, or from the node's output if ComfyUI had
// cached the run.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { ConceptList } from "./lib/concept_list.js";
import { showFullSize } from "./lib/full_size.js";
import { LossChart } from "./lib/loss_chart.js";
import { after, element, filled } from "./lib/page.js";
import { texts } from "./lib/texts.js";

const TEXTS = await texts("panel");

const EVENT = "textual_inversion.run";
const AT_WORK = ["encoding", "searching", "learning", "drawing", "finishing"];
const ACTIVE = ["waiting", ...AT_WORK]; // a concept waits for others of its run
const PREVIEWABLE = ["searching", "learning", "drawing"];
const STOPPABLE = ["waiting", ...PREVIEWABLE];
const HEIGHTS = { line: 18, chart: 128, pictures: 92, buttons: 36 }; // with the gaps above them
const MARGIN = 10;

const panels = new WeakMap(); // node -> TrainPanel
const fresh = new Set(); // ids of runs at work, until their node's output comes
const groups = new Map(); // workflow and node -> the latest run's concepts: run id -> latest record

app.registerExtension({
  name: "textualinversion.TrainPanel",

  async setup() {
    let asked = askForRuns();
    const take = (record) => asked.then(() => keep(record), () => keep(record)); // what the answer says is older
    api.addEventListener(EVENT, ({ detail }) => take(detail));
    api.addEventListener("reconnected", () => (asked = askForRuns()));
    await asked;
  },

  nodeCreated(node) {
    if (node.comfyClass !== "TI_Train") return;
    panels.set(node, new TrainPanel(node));
    showTemplateWhereItIsUsed(node);
    nameTextFields(node);
  },

  /** Called after every load, undo and change of tab, which create all nodes again. */
  afterConfigureGraph() {
    groups.forEach((group) => group.forEach(show));
  },
});

/** Fetches the runs that this tab has queued. Active runs that the server does not know ended when it was restarted. */
async function askForRuns() {
  const client = api.clientId ?? api.initialClientId ?? ""; // before the server has answered, that of before the reload
  const answer = await api.fetchApi(`/textual_inversion/runs?${new URLSearchParams({ client_id: client })}`);
  const runs = await answer.json();
  const known = new Set(runs.map((record) => record.run));
  for (const record of [...groups.values()].flatMap((group) => [...group.values()])) {
    if (ACTIVE.includes(record.state) && !known.has(record.run)) {
      keep({ ...record, state: "failed", message: TEXTS.lost });
    }
  }
  runs.forEach(keep);
}

function keep(record) {
  if (ACTIVE.includes(record.state)) fresh.add(record.run);
  const key = `${record.workflow} ${record.node}`;
  const [first] = groups.get(key)?.values() ?? [];
  if (first?.group !== record.group || !record.concept) groups.set(key, new Map());
  groups.get(key).set(record.run, record);
  show(record);
}

function show(record) {
  if (record.workflow === app.rootGraph.id) panels.get(nodeAt(record.node))?.take(record);
}

/** The node with this execution id: "7:3" is node 3 in the subgraph of node 7. */
function nodeAt(executionId) {
  const path = executionId.split(":");
  const id = path.pop();
  let graph = app.rootGraph;
  for (const step of path) graph = graph?.getNodeById(step)?.subgraph;
  return graph?.getNodeById(id);
}

/** Only the kind "custom" takes its prompts from "template". */
function showTemplateWhereItIsUsed(node) {
  const [kind, template] = ["kind", "template"].map((name) => node.widgets.find((widget) => widget.name === name));
  const update = () => {
    const slot = node.inputs?.findIndex((input) => input.widget?.name === "kind") ?? -1;
    const elsewhere = slot >= 0 && node.isInputConnected(slot); // a link or the block around it says the kind
    template.hidden = template.options.hidden = kind.value !== "custom" && !elsewhere;
    node.graph?.setDirtyCanvas(true, false);
  };
  after(kind, "callback", update);
  after(node, "onConfigure", update);
  after(node, "onConnectionsChange", update);
  update();
}

/** The canvas shows a text field of several lines without its name; it fits into the margin above. */
function nameTextFields(node) {
  const draw = node.onDrawForeground;
  node.onDrawForeground = function (context) {
    draw?.apply(this, arguments);
    if (this.flags.collapsed || app.canvas.low_quality) return;
    context.fillStyle = LiteGraph.WIDGET_SECONDARY_TEXT_COLOR;
    context.font = "9px Inter, Arial, sans-serif";
    context.textAlign = "left";
    for (const widget of this.widgets) {
      if (widget.element?.tagName !== "TEXTAREA" || widget.hidden) continue;
      context.fillText(widget.label ?? widget.name, 12, widget.y + 8);
    }
  };
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
    this.stopAll = this.button("stopAll", TEXTS.concepts.stopAll, TEXTS.concepts.stopAllHelp);
    this.concepts = new ConceptList(TEXTS.concepts, this.stopAll, (record) => this.pick(record));
    this.stop = this.button("stop", TEXTS.stop, TEXTS.stopHelp);
    this.preview = this.button("preview", TEXTS.preview, TEXTS.previewHelp);
    const buttons = element("div", { className: "ti-buttons" }, this.stop, this.preview);
    this.lines = element("div", {}, this.state, this.details, this.message);
    this.run = element("div", { className: "ti-run" }, this.concepts.root, this.lines, this.chart.root, this.strip.root);
    this.run.append(buttons);
    new ResizeObserver(() => this.fit()).observe(this.lines); // a message takes as many lines as it needs
    const style = element("link", { rel: "stylesheet", href: new URL("train_panel.css", import.meta.url) });
    this.root = element("div", { className: "ti-train ti-colours" }, style, this.hint, this.run);
    leaveToCanvas(this.root, this.strip.root, this.concepts.list);

    this.run.hidden = true;
    const widget = node.addDOMWidget("training", "ti_train_panel", this.root, {
      serialize: false,
      hideInPanel: true, // it has no value to set
      hideOnZoom: false, // people watch it while they see the whole graph
      margin: MARGIN,
      getMinHeight: () => this.height + 2 * MARGIN,
      getMaxHeight: () => (this.record ? undefined : this.height + 2 * MARGIN),
    });
    widget.serialize = false;
    this.fit();

    const onExecuted = node.onExecuted;
    node.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      // ComfyUI finds the node by its number in the workflow that is open. That may be another one by now, unless the
      // run is cached: then it may have been made by another workflow.
      message.textual_inversion
        ?.filter((record) => !fresh.delete(record.run) || record.workflow === app.rootGraph.id)
        .forEach((record) => panels.get(this).take(record));
    };
  }

  button(action, label, help) {
    const onclick = async () => {
      this.asked[action] = this.asking(action);
      this.enable();
      const [run, what] = action === "stopAll" ? [this.record.group, "stop"] : [this.record.run, action];
      const answer = await post(`${run}/${what}`);
      if (answer.ok) return;
      delete this.asked[action]; // so that it can be asked once more
      this.enable();
      tell("warn", label, TEXTS.refused);
    };
    return element("button", { type: "button", textContent: label, title: help, onclick });
  }

  /** What a click requests now: the end of this run, or one more picture. The same request is not sent twice. */
  asking(action) {
    const { group, run, pictures } = this.record;
    return { stop: run, stopAll: group, preview: `${run} ${pictures.length}` }[action];
  }

  enable() {
    const { state } = this.record;
    const possible = {
      stop: STOPPABLE.includes(state) && this.asked.stopAll !== this.asking("stopAll"),
      stopAll: STOPPABLE.some((one) => this.concepts.count(one)),
      preview: PREVIEWABLE.includes(state),
    };
    for (const action of Object.keys(possible)) {
      this[action].disabled = !possible[action] || this.asked[action] === this.asking(action);
    }
  }

  /** Takes the latest record of a run or of one of its concepts. The concept at work is shown, until one is picked. */
  take(record) {
    const isOther = !record.concept || this.record?.group !== record.group;
    if (isOther) {
      this.picked = false;
      this.concepts.clear();
    }
    const { height } = this.concepts;
    if (record.concept) this.concepts.update(record);
    const isNext = !this.picked && !AT_WORK.includes(this.record?.state) && AT_WORK.includes(record.state);
    if (isOther || isNext || this.record.run === record.run) this.show(record);
    else {
      this.enable();
      if (this.concepts.height !== height) this.fit();
    }
  }

  pick(record) {
    this.picked = true;
    this.show(record);
  }

  show(record) {
    this.record = record;
    this.hint.hidden = true;
    this.run.hidden = false;
    this.run.dataset.state = record.state;
    this.concepts.select(record);
    setText(this.state, stateText(record));
    setText(this.details, detailText(record));
    setText(this.message, record.message);
    this.chart.show(record, ACTIVE.includes(record.state));
    this.chart.root.hidden = !record.losses.length;
    this.strip.show(record);
    this.enable();
    this.fit();
    this.node.graph?.setDirtyCanvas(true, false);
  }

  /** Sets the minimum height: the canvas asks the widget for it, Vue nodes read it from the style. */
  fit() {
    let height = this.lines.offsetHeight || HEIGHTS.line; // 0 while the node is out of sight
    height += this.concepts.height;
    if (this.record) height += HEIGHTS.buttons;
    if (this.record?.losses.length) height += HEIGHTS.chart;
    if (this.record?.pictures.length) height += HEIGHTS.pictures;
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

  frame({ step, result, aspect, filename, subfolder, type }) {
    const src = api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
    const label = result ? TEXTS.result : filled(TEXTS.pictureStep, { step });
    const image = element("img", { src, alt: label, draggable: false });
    image.style.aspectRatio = aspect; // known before the picture is loaded, so that the strip can scroll to its end
    const frame = element("button", { type: "button", title: label }, image, element("span", { textContent: label }));
    frame.onclick = () => {
      const frames = [...this.root.children];
      showFullSize(this.root.closest(".ti-train"), frames.map(({ picture }) => picture), frames.indexOf(frame), below);
    };
    frame.picture = { src, title: label, keep: result ? null : () => keepPicture(this.run, step) };
    return frame;
  }
}

/** What stands under a preview picture in full size: its step, and the button that keeps its embedding. */
function below({ title, keep }) {
  const line = element("div", { className: "ti-kept" }, title);
  const button = { type: "button", textContent: TEXTS.keep, title: TEXTS.keepHelp, onclick: keep };
  if (keep) line.append(element("button", button));
  return [line];
}

/** Makes what the preview of this step shows the result of the run; after its end the server saves it. */
async function keepPicture(run, step) {
  const answer = await post(`${run}/keep/${step}`);
  if (!answer.status) return tell("warn", TEXTS.keep, TEXTS.refused);
  if (answer.status === 507) return tell("error", TEXTS.keep, (await answer.json()).error); // the disk refused it
  if (!answer.ok) return tell("warn", TEXTS.keep, answer.status === 409 ? TEXTS.ending : TEXTS.gone);
  const { saved } = await answer.json();
  tell("success", TEXTS.keep, saved ? filled(TEXTS.saved, { name: saved }) : filled(TEXTS.kept, { step }));
}

/** Asks the server for something about a run; an empty answer where it cannot be reached. */
function post(what) {
  return api.fetchApi(`/textual_inversion/runs/${what}`, { method: "POST" }).catch(() => ({}));
}

function tell(severity, summary, detail) {
  app.extensionManager.toast.add({ severity, summary, detail, life: 8000 });
}

/**
 * Passes wheel and middle button on to the canvas, as text fields of a node do. Sideways, the strip scrolls; a list
 * that has the focus does too.
 */
function leaveToCanvas(root, strip, list) {
  root.addEventListener("wheel", (event) => {
    const sideways = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY);
    event.stopPropagation();
    if (sideways && strip.contains(event.target) && strip.scrollWidth > strip.clientWidth) return;
    if (!sideways && list.contains(event.target) && document.activeElement === list) return;
    event.preventDefault();
    app.canvas.processMouseWheel(event);
  });
  const middle = (event) => event.button === 1 || event.buttons & 4;
  root.addEventListener("pointerdown", (event) => middle(event) && app.canvas.processMouseDown(event));
  root.addEventListener("pointermove", (event) => middle(event) && app.canvas.processMouseMove(event));
  root.addEventListener("pointerup", (event) => middle(event) && app.canvas.processMouseUp(event));
}

function stateText({ concept, state, step, steps, rate, seconds_left: secondsLeft }) {
  const parts = [filled(state === "waiting" ? TEXTS.concepts.waiting : TEXTS[state], { step, steps })];
  if (state === "learning" && rate > 0) parts.push(filled(TEXTS.rate, { rate: rate.toPrecision(3) }));
  if (state === "learning" && secondsLeft > 0) parts.push(filled(TEXTS.left, { time: duration(secondsLeft) }));
  return `${concept ? `${concept} · ` : ""}${parts.join(", ")}`;
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
