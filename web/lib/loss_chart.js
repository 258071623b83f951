// A small chart of two curves: training loss (noisy, drawn smoothed and thin) and the loss on fixed noise.
//
// The drawing has its own coordinates and is stretched over whatever place the node gives it; strokes keep their
// width, and points are strokes without length, so nothing has to be drawn anew when the node is resized.

import { element, filled } from "./page.js";

const SIZE = 1000; // of the drawing, both ways
const SMOOTHING = 0.08; // of the steps: how far back the mean of the training loss reaches

export class LossChart {
  /** `words`: what "fixed" and "training" loss are called, and "step" with {step} in it. */
  constructor(words) {
    this.words = words;
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

  /** Draws the curves of a run. While it is active, the axis reaches to the last step planned. */
  show({ step, steps, best, losses, fixed }, active) {
    this.end = Math.max(1, active ? steps : step);
    this.curves = { training: smoothed(losses, SMOOTHING * this.end), fixed };
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

  /** Tells the losses at the step under `clientX`; null: what the lines mean. */
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
    const measured = fixed.filter(([at]) => at <= step).slice(-1); // only now and then: the latest
    this.cursor.setAttribute("d", this.uprights([[step]]));
    this.legend.replaceChildren(
      element("span", { textContent: filled(this.words.step, { step }) }),
      ...measured.map(([, value]) => this.entry("fixed", value)),
      this.entry("training", loss),
    );
  }

  entry(curve, loss) {
    const words = loss === undefined ? this.words[curve] : `${this.words[curve]} ${number(loss)}`;
    return element("span", { className: `ti-key ti-key-${curve}`, textContent: words });
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

/** The running mean of a curve, reaching `reach` steps back. */
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

/** The point of a curve whose step is nearest. */
function nearest(curve, step) {
  const distance = (point) => Math.abs(point[0] - step);
  return curve.reduce((best, point) => (distance(point) < distance(best) ? point : best));
}

function number(loss) {
  return loss.toPrecision(3);
}
