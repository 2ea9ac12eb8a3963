// Where the time of one request went: the gateway's record as bars on one axis of time, and as a table.

import { h, s } from "./dom.js";
import { ms } from "./units.js";

const NAMES = {
  gateway: "Gateway", queue: "Queue", reservation: "Reservation", prefill_wait: "Wait for prefill", prefill: "Prefill", way_back: "Way back",
  handoff: "Hand-off", decode_wait: "Wait for decode", decode: "First decode step",
};
const LOOKS = { gateway: "answer", queue: "warn", reservation: "muted", prefill_wait: "warn", prefill: "prefill", way_back: "answer", handoff: "handoff", decode_wait: "warn", decode: "decode" };
const ROW = 22;
const LABEL = 118;
const WIDTH = 420;
const VALUE = 62;

/** What to show for `trace`, or a word on why there is nothing. */
export function waterfall(trace) {
  if (!trace.parts) return [h("p", { class: "note" }, trace.missing ? `Where the time went cannot be told: ${trace.missing}` : "This gateway has no record of where the time went (it keeps those of its latest requests).")];
  const parts = trace.parts.filter((part) => part.ms > 0);
  const end = Math.max(trace.ttft_ms ?? 0, second(trace) ?? 0, ...parts.map((part) => part.start_ms + part.ms)) || 1;
  const figure = h("figure", { class: "waterfall" },
    h("figcaption", null, summary(trace)),
    drawing(joined(parts), trace, end),
    h("details", null, h("summary", null, "As a table"), table(parts, trace)));
  return [figure];
}

/** When the second token came: it is told from the first one on. */
const second = (trace) => (trace.second_token_ms == null ? null : (trace.ttft_ms ?? 0) + trace.second_token_ms);

/** Parts of one name that follow each other, as one: a way back leads through several services. */
function joined(parts) {
  const rows = [];
  for (const part of parts) {
    const last = rows.at(-1);
    if (last?.name !== part.name || last.of !== part.of) rows.push({ ...part });
    else {
      const [from, to] = [Math.min(last.start_ms, part.start_ms), Math.max(last.until ?? last.start_ms + last.ms, part.start_ms + part.ms)];
      Object.assign(last, { start_ms: from, until: to, ms: last.ms + part.ms });
    }
  }
  return rows;
}

function summary(trace) {
  const facts = [`first token after ${ms(trace.ttft_ms)}`, trace.second_token_ms != null && `the second ${ms(trace.second_token_ms)} later`, `all after ${ms(trace.total_ms)}`,
    trace.migrations > 0 && `moved ${trace.migrations === 1 ? "once" : `${trace.migrations} times`}`].filter(Boolean);
  return h("span", null, h("b", null, "Where the time went: "), facts.join(", "));
}

function drawing(parts, trace, end) {
  const height = parts.length * ROW + 18;
  const x = (at) => LABEL + (at / end) * (WIDTH - LABEL - VALUE);
  const rows = parts.flatMap((part, index) => bar(part, index * ROW, x));
  const marks = [["first token", trace.ttft_ms], ["second", second(trace)]].filter(([, at]) => at != null && at <= end).flatMap(([name, at], index) => [
    s("line", { class: "mark-line", x1: x(at), x2: x(at), y1: 0, y2: height - 16 }),
    s("text", { class: "tick", x: x(at) + (index ? 2 : -2), y: height - 4, "text-anchor": index ? "start" : "end" }, name),
  ]);
  return s("svg", { viewBox: `0 0 ${WIDTH} ${height}`, "aria-hidden": "true" }, marks, rows);
}

function bar(part, y, x) {
  const [from, to] = [x(part.start_ms), x(part.until ?? part.start_ms + part.ms)];
  const width = Math.max(2, to - from);
  return [
    s("text", { class: "part", x: 0, y: y + 14 }, NAMES[part.name] ?? part.name),
    s("rect", { class: `mark ${LOOKS[part.name] ?? "muted"}`, x: from.toFixed(1), y: y + 4, width: width.toFixed(1), height: 13, rx: 2.5 }),
    s("text", { class: "amount", x: from + width + 5, y: y + 14 }, ms(part.ms)),
  ];
}

function table(parts, trace) {
  const unexplained = [["ttft", "to the first token"], ["second_token", "to the second"]]
    .filter(([of]) => trace.unexplained_ms?.[of] != null)
    .map(([of, words]) => h("tr", null, h("th", { scope: "row" }, `Unexplained, ${words}`), h("td", null, ""), h("td", null, ""), h("td", null, ms(trace.unexplained_ms[of]))));
  return h("table", null, h("caption", { class: "unseen" }, "Where the time went"),
    h("thead", null, h("tr", null, ["Part", "Where", "From", "Took"].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", null, parts.map((part) => h("tr", null, h("th", { scope: "row" }, NAMES[part.name] ?? part.name), h("td", null, part.service), h("td", null, ms(part.start_ms)), h("td", null, ms(part.ms)))), unexplained));
}
