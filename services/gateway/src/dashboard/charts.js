// The charts: lines, stacked areas and bars over time, drawn as SVG. Each can be read by pointer, by arrow keys, by a
// screen reader (it is a slider through time whose value is the reading), and as a table.

import { $, h, s, show } from "./dom.js";
import { byteRate, clock, count, ms, much, rate } from "./units.js";

const line = (field, name, look) => ({ field, name, look });

const CHARTS = [
  { title: "Time to first token", kind: "lines", write: ms, none: "No first token in this time",
    series: [line("ttft_p50", "p50", "answer"), line("ttft_p95", "p95", "answer middle"), line("ttft_p99", "p99", "answer faint")] },
  { title: "Time between tokens", kind: "lines", write: ms, none: "No tokens in this time",
    series: [line("itl_p50", "p50", "answer"), line("itl_p95", "p95", "answer middle"), line("itl_p99", "p99", "answer faint")] },
  { title: "Tokens", kind: "lines", write: rate, none: "No tokens in this time",
    series: [line("completion_tokens_rate", "decoded", "decode"), line("prompt_tokens_rate", "prefilled", "prefill")] },
  { title: "Requests", kind: "lines", write: much, none: "None running when sampled",
    series: [line("running", "running", "decode"), line("queued", "in the queue", "warn")] },
  { title: "Hand-off", kind: "lines", write: byteRate, none: "No hand-offs in this time",
    series: [line("handoff_bytes_rate", "KV bytes", "handoff")], more: [{ field: "handoff_rate", name: "hand-offs", write: rate }] },
  { title: "Time of a hand-off", kind: "lines", write: ms, none: "No hand-offs in this time",
    series: [line("handoff_ms", "mean", "handoff")] },
  { title: "KV blocks", kind: "areas", write: much, none: "No blocks in use",
    series: [line("blocks_used", "used", "decode"), line("blocks_cached", "cached", "decode middle"), line("blocks_quarantined", "quarantined", "bad")],
    more: [{ field: "blocks_total", name: "of all", write: count }] },
  { title: "Requests not answered", kind: "bars", write: count, none: "None in this time",
    series: [line("failed", "failed (5xx)", "bad"), line("refused", "refused (4xx)", "warn"), line("left", "client left", "muted")] },
  { title: "Continued elsewhere", kind: "bars", write: count, none: "None in this time",
    series: [line("preempted", "preempted", "warn"), line("prefill_lost", "prefill lost", "prefill"), line("decode_lost", "decode lost", "bad"), line("drained", "drained", "muted")] },
];

const HEIGHT = 128;
const EDGE = { top: 8, right: 8, bottom: 20, left: 46 };
const BINS = 40;
const ROWS = 30;

/** All charts in `parent`, sharing one length of time and the choice between drawing and table. */
export function charts(parent) {
  const all = CHARTS.map((spec) => new Chart(spec));
  const view = { minutes: 5, tables: false, fields: [], samples: [] };
  const draw = () => all.forEach((chart) => chart.draw(view));
  parent.append(...all.map((chart) => chart.figure));
  new ResizeObserver(draw).observe(parent);
  const lengths = document.querySelectorAll("[data-minutes]");
  lengths.forEach((button) => button.addEventListener("click", () => {
    view.minutes = Number(button.dataset.minutes);
    lengths.forEach((other) => other.setAttribute("aria-pressed", other === button));
    draw();
  }));
  $("tables").addEventListener("click", () => {
    view.tables = !view.tables;
    $("tables").setAttribute("aria-pressed", view.tables);
    draw();
  });
  return { update(fields, samples) { Object.assign(view, { fields, samples }); draw(); } };
}

class Chart {
  constructor(spec) {
    this.spec = spec;
    this.at = null; // of the point that is read, in milliseconds since the epoch
    this.now = h("p", { class: "now" });
    this.svg = s("svg", { "aria-hidden": "true" });
    this.reading = h("div", { class: "reading", hidden: true });
    this.plot = h("div", { class: "plot", tabindex: 0, role: "slider", "aria-label": `${spec.title}, through time`, "aria-valuemin": 0, "aria-valuemax": 0, "aria-valuenow": 0 }, this.svg, this.reading);
    this.table = h("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": `${spec.title}, as a table`, hidden: true });
    this.figure = h("figure", { class: `card chart ${spec.kind}` },
      h("figcaption", null, h("h3", null, spec.title), this.now), this.plot, this.table, this.legend());
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    // Who reads by keyboard keeps the reading, wherever the pointer lies.
    this.plot.addEventListener("pointerleave", () => { if (document.activeElement !== this.plot) this.read(null); });
    this.plot.addEventListener("blur", () => this.read(null));
    this.plot.addEventListener("keydown", (event) => this.press(event));
  }

  legend() {
    const keys = this.spec.series.map(({ name, look }) => h("span", null, h("i", { class: `key ${look}` }), name));
    return h("p", { class: "legend", "aria-hidden": "true" }, keys);
  }

  draw({ minutes, tables, fields, samples }) {
    const column = (field) => fields.indexOf(field);
    const end = samples.at(-1)?.[0] ?? Date.now();
    // A young cluster's charts begin with it, so that they are not mostly empty.
    this.span = [Math.max(end - minutes * 60_000, Math.min(samples[0]?.[0] ?? 0, end - 60_000)), end];
    const shown = samples.filter((sample) => sample[0] >= this.span[0]);
    const points = shown.map((sample) => ({ at: sample[0], values: this.spec.series.map(({ field }) => sample[column(field)] ?? null), more: (this.spec.more ?? []).map(({ field }) => sample[column(field)] ?? null) }));
    this.points = this.spec.kind === "bars" ? this.bins(points) : points;
    this.plot.hidden = tables;
    this.table.hidden = !tables;
    if (tables) this.tabulate();
    else this.paint();
    this.tell();
  }

  /** Counts of events, added up over equal pieces of time. */
  bins(points) {
    const [start, end] = this.span;
    const width = (end - start) / BINS;
    const bins = Array.from({ length: BINS }, (_, index) => ({ at: start + (index + 1) * width, values: this.spec.series.map(() => 0), more: [] }));
    for (const { at, values } of points) {
      const bin = bins[Math.min(BINS - 1, Math.floor((at - start) / width))];
      values.forEach((value, index) => { bin.values[index] += value ?? 0; });
    }
    return bins;
  }

  paint() {
    const width = Math.max(160, this.plot.clientWidth);
    const inner = { width: width - EDGE.left - EDGE.right, height: HEIGHT - EDGE.top - EDGE.bottom };
    const stacked = this.spec.kind !== "lines";
    const height = ({ values }) => (stacked ? values.reduce((total, value) => total + (value ?? 0), 0) : Math.max(...values.map((value) => value ?? 0)));
    const most = Math.max(0, ...this.points.map(height));
    const top = nice(most, this.spec.kind === "bars" || this.spec.write === much);
    this.x = (at) => EDGE.left + ((at - this.span[0]) / (this.span[1] - this.span[0])) * inner.width;
    this.y = (value) => EDGE.top + (1 - value / top) * inner.height;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.empty = most === 0;
    show(this.svg, ...this.axes(width, top), ...(this.empty ? [this.nothing(width)] : this.marks(inner.width)), this.cursor());
    this.plot.setAttribute("aria-valuemax", Math.max(0, this.points.length - 1));
  }

  axes(width, top) {
    const whole = this.span[1] - this.span[0];
    const levels = this.empty ? [0] : [0, top / 2, top];
    const grid = levels.flatMap((value) => [
      s("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: this.y(value), y2: this.y(value) }),
      s("text", { class: "tick", x: EDGE.left - 6, y: this.y(value) + 3.5, "text-anchor": "end" }, this.empty ? "0" : this.spec.write(value)),
    ]);
    const times = [[0, "end", "now"], [0.5, "middle", ago(whole / 2)], [1, "start", ago(whole)]].map(([back, anchor, words]) =>
      s("text", { class: "tick", x: this.x(this.span[1] - back * whole), y: HEIGHT - 5, "text-anchor": anchor }, words));
    return [...grid, ...times];
  }

  nothing(width) {
    return s("text", { class: "none", x: (width + EDGE.left) / 2, y: HEIGHT / 2 - 2, "text-anchor": "middle" }, this.points.length ? this.spec.none : "Waiting for the first samples");
  }

  marks(width) {
    const { kind, series } = this.spec;
    if (kind === "bars") return this.bars(width);
    if (kind === "areas") return this.areas();
    const lines = series.map(({ look }, index) => s("path", { class: `line ${look}`, d: this.path((point) => point.values[index]) }));
    const alone = series.flatMap(({ look }, index) => this.alone(index).map((point) => s("circle", { class: `mark ${look}`, cx: this.x(point.at), cy: this.y(point.values[index]), r: 2.2 })));
    const shade = s("path", { class: `shade ${series[0].look}`, d: this.path((point) => point.values[0], () => 0) });
    return [shade, ...lines.reverse(), ...alone];
  }

  /** Points with no neighbour, through which no line goes. */
  alone(index) {
    const value = (at) => this.points[at]?.values[index] ?? null;
    return this.points.filter((_, at) => value(at) !== null && value(at - 1) === null && value(at + 1) === null);
  }

  bars(width) {
    const each = width / BINS;
    return this.points.flatMap(({ at, values }) => {
      let below = 0;
      return values.map((value, index) => {
        if (!value) return null;
        const bar = s("rect", { class: `mark ${this.spec.series[index].look}`, x: this.x(at) - each + 1, width: Math.max(1, each - 2), y: this.y(below + value), height: this.y(below) - this.y(below + value), rx: 1 });
        below += value;
        return bar;
      }).filter(Boolean);
    });
  }

  areas() {
    const under = (index) => ({ values }) => values.slice(0, index).reduce((total, value) => total + (value ?? 0), 0);
    return this.spec.series.map(({ look }, index) => {
      const upper = (point) => (point.values[index] === null ? null : under(index + 1)(point));
      return s("path", { class: `mark ${look}`, d: this.path(upper, under(index)) });
    });
  }

  /** A line through the points that have a value; closed down to `floor`, an area. */
  path(value, floor) {
    const runs = [[]];
    for (const point of this.points) {
      if (value(point) === null) runs.push([]);
      else runs.at(-1).push(point);
    }
    const place = (point, of) => `${this.x(point.at).toFixed(1)},${this.y(of(point)).toFixed(1)}`;
    return runs.filter((run) => run.length).map((run) => {
      const there = run.map((point) => place(point, value)).join("L");
      const back = floor ? `L${[...run].reverse().map((point) => place(point, floor)).join("L")}Z` : run.length === 1 ? "h0.01" : "";
      return `M${there}${back}`;
    }).join("");
  }

  cursor() {
    const point = this.found();
    if (!point || this.empty) return s("g");
    const x = this.x(point.at) - (this.spec.kind === "bars" ? (this.x(this.span[1]) - EDGE.left) / BINS / 2 : 0);
    const dots = this.spec.kind === "lines" ? point.values.map((value, index) => value !== null && s("circle", { class: `dot ${this.spec.series[index].look}`, cx: x, cy: this.y(value), r: 3 })) : [];
    return s("g", null, s("line", { class: "cursor", x1: x, x2: x, y1: EDGE.top, y2: HEIGHT - EDGE.bottom }), dots);
  }

  found() {
    if (this.at === null || this.points.length === 0) return null;
    return this.points.reduce((best, point) => (Math.abs(point.at - this.at) < Math.abs(best.at - this.at) ? point : best));
  }

  point(event) {
    if (!this.points?.length) return;
    const box = this.plot.getBoundingClientRect();
    const share = (event.clientX - box.left - EDGE.left) / (box.width - EDGE.left - EDGE.right);
    this.read(this.span[0] + Math.min(1, Math.max(0, share)) * (this.span[1] - this.span[0]));
  }

  press(event) {
    const last = this.points.length - 1;
    const here = this.at === null ? last + 1 : this.points.indexOf(this.found());
    const to = { ArrowLeft: here - 1, ArrowRight: here + 1, PageUp: here - 10, PageDown: here + 10, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.read(null);
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.read(this.points[Math.min(last, Math.max(0, to))].at);
  }

  read(at) {
    this.at = at;
    if (!this.svg.lastChild) return;
    this.svg.lastChild.replaceWith(this.cursor());
    this.tell();
  }

  /** The values under the cursor beside it, the latest ones in the heading, both in words for a screen reader. */
  tell() {
    const latest = this.points.at(-1);
    const whole = this.spec.kind === "bars" ? this.points.reduce((total, { values }) => total + values.reduce((a, b) => a + b, 0), 0) : latest?.values[0];
    show(this.now, this.spec.write(whole ?? null));
    const point = this.found();
    this.reading.hidden = !point || this.empty;
    const told = point ?? latest;
    this.plot.setAttribute("aria-valuenow", told ? this.points.indexOf(told) : 0);
    this.plot.setAttribute("aria-valuetext", told ? `${clock(told.at)}: ${this.values(told).map(([name, value]) => `${name} ${value}`).join(", ")}` : "no samples yet");
    if (this.reading.hidden) return;
    show(this.reading, h("b", null, clock(point.at)), ...this.values(point).map(([name, value, look]) => h("span", null, look ? h("i", { class: `key ${look}` }) : null, `${name} `, h("b", null, value))));
    const x = this.x(point.at);
    this.reading.classList.toggle("left", x > this.plot.clientWidth / 2);
    this.reading.style.left = `${x}px`;
  }

  values({ values, more }) {
    return [...this.spec.series.map(({ name, look }, index) => [name, this.spec.write(values[index]), look]),
      ...(this.spec.more ?? []).map(({ name, write }, index) => [name, write(more[index]), null])];
  }

  tabulate() {
    const step = Math.max(1, Math.ceil(this.points.length / ROWS));
    const points = this.points.filter((_, index) => (this.points.length - 1 - index) % step === 0).reverse();
    const names = [...this.spec.series, ...(this.spec.more ?? [])].map(({ name }) => name);
    show(this.table, h("table", null, h("caption", { class: "unseen" }, this.spec.title),
      h("thead", null, h("tr", null, ["Time", ...names].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", null, points.map((point) => h("tr", null, h("th", { scope: "row" }, clock(point.at)), this.values(point).map(([, value]) => h("td", null, value)))))));
  }
}

const ago = (time) => (time > 90_000 ? `−${(time / 60_000).toFixed(time % 60_000 ? 1 : 0)} min` : `−${Math.round(time / 1000)} s`);

/** The least of 1, 2, 4, 6, 10, … that is no less than `value`: half of it is a round number too. `whole`: and a whole one. */
function nice(value, whole) {
  if (value <= 0) return 1;
  if (whole && value <= 2) return 2;
  const power = 10 ** Math.floor(Math.log10(value));
  const step = [1, 2, 4, 6, 10].find((factor) => factor * power >= value * 0.999);
  return step * power;
}
