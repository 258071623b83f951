// A small chart with two curves: the training loss (noisy, so smoothed and thin) and the loss on fixed noise.
//
// The SVG has coordinates of its own and is stretched to the size of its element. Strokes keep their width, and
// points are strokes of length zero, so nothing has to be redrawn when the node is resized.

import { element, filled } from "./page.js";

const SIZE = 1000; // width and height of the SVG in its own coordinates
const SMOOTHING = 0.08; // time constant of the moving average of the training loss, as a share of all steps

export class LossChart {
  /** `texts`: labels for the "fixed" and the "training" loss, and "step" with {step} in it. */
  constructor(texts) {
    this.texts = texts;
    this.curves = { training: [], fixed: [] };

    this.best = drawn("path", "ti-best");
    this.training = drawn("path", "ti-training");
    this.fixed = drawn("path", "ti-fixed");
    this.points = drawn("path", "ti-points");
    this.bestPoint = drawn("path", "ti-best-point");
    this.cursor = drawn("path", "ti-cursor");
    this.drawing = drawn("svg", "");
    this.drawing.setAttribute("viewBox", `0 0 ${SIZE} ${SIZE}`);
    this.drawing.setAttribute("preserveAspectRatio", "none");
    this.drawing.append(this.best, this.training, this.fixed, this.points, this.bestPoint, this.cursor);

    this.legend = element("div", { className: "ti-legend" });
    this.high = element("span");
    this.low = element("span");
    this.last = element("span");
    const losses = element("div", { className: "ti-losses" }, this.high, this.low);
    const steps = element("div", { className: "ti-steps" }, element("span", { textContent: "0" }), this.last);
    this.plot = element("div", { className: "ti-plot" }, this.drawing);
    this.root = element("div", { className: "ti-chart" }, this.legend, losses, this.plot, steps);

    this.plot.onpointermove = (event) => this.point(event.clientX);
    this.plot.onpointerleave = () => this.point(null);
  }

  /** Draws the curves of a run. While it is active, the axis ends where the run may end. */
  show({ step, planned, best, losses, fixed }, active) {
    this.end = Math.max(1, active ? planned : step);
    const numbers = losses.filter(([, loss]) => loss !== null); // NaN is null in JSON
    this.curves = { training: smoothed(numbers, SMOOTHING * this.end), fixed };
    const shown = [...this.curves.training, ...fixed].map(([, loss]) => loss);
    this.max = Math.max(...shown);
    this.min = Math.min(...shown);

    const bestPoint = fixed.filter(([at]) => at === best);
    this.training.setAttribute("d", this.line(this.curves.training));
    this.fixed.setAttribute("d", this.line(fixed));
    this.points.setAttribute("d", this.dots(fixed));
    this.bestPoint.setAttribute("d", this.dots(bestPoint));
    this.best.setAttribute("d", this.uprights(bestPoint));

    this.high.textContent = shown.length ? number(this.max) : "";
    this.low.textContent = shown.length ? number(this.min) : "";
    this.last.textContent = this.end;
    this.point(this.pointedAt);
  }

  /** Shows the losses at the step under `clientX`, or for null the legend. */
  point(clientX) {
    this.pointedAt = clientX;
    const { training, fixed } = this.curves;
    if (clientX == null || !training.length) {
      this.cursor.setAttribute("d", "");
      this.legend.replaceChildren(this.entry("fixed"), this.entry("training"));
      return;
    }
    const { left, width } = this.plot.getBoundingClientRect();
    const [step, loss] = nearest(training, ((clientX - left) / width) * this.end);
    const measured = fixed.filter(([at]) => at <= step).slice(-1); // not measured at every step, so the latest one
    this.cursor.setAttribute("d", this.uprights([[step]]));
    this.legend.replaceChildren(
      element("span", { textContent: filled(this.texts.step, { step }) }),
      ...measured.map(([, value]) => this.entry("fixed", value)),
      this.entry("training", loss),
    );
  }

  entry(curve, loss) {
    const text = loss === undefined ? this.texts[curve] : `${this.texts[curve]} ${number(loss)}`;
    return element("span", { className: `ti-key ti-key-${curve}`, textContent: text });
  }

  place([step, loss]) {
    const height = this.max - this.min || 1;
    return [(step / this.end) * SIZE, ((this.max - loss) / height) * SIZE].map((at) => at.toFixed(1));
  }

  line(curve) {
    return curve.length ? `M${curve.map((point) => this.place(point).join(" ")).join("L")}` : "";
  }

  dots(curve) {
    return curve.map((point) => `M${this.place(point).join(" ")}h0`).join("");
  }

  uprights(curve) {
    return curve.map(([step]) => `M${((step / this.end) * SIZE).toFixed(1)} 0v${SIZE}`).join("");
  }
}

function drawn(tag, className) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  made.setAttribute("class", className);
  return made;
}

/** The exponential moving average of a curve, with a time constant of `reach` steps. */
function smoothed(curve, reach) {
  let sum = 0;
  let weight = 0;
  let before = 0;
  return curve.map(([step, loss]) => {
    const kept = Math.exp(-(step - before) / reach);
    sum = kept * sum + loss;
    weight = kept * weight + 1;
    before = step;
    return [step, sum / weight];
  });
}

/** The point of a curve that is nearest to `step`. */
function nearest(curve, step) {
  const distance = (point) => Math.abs(point[0] - step);
  return curve.reduce((best, point) => (distance(point) < distance(best) ? point : best));
}

function number(loss) {
  return loss.toPrecision(3);
}
