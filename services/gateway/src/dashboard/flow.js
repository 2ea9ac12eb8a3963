// The strip at the top: a request's way through the cluster, with what each station does now.

import { h } from "./dom.js";
import { byteRate, bytes, count, many, ms, much, rate, split, NONE } from "./units.js";

export function flow(status, latest) {
  const load = (role) => sum(status.members.filter((member) => member.role === role));
  const pool = (role) => status.pools.find((known) => known.role === role);
  const apart = pool("prefill") || pool("decode") || !pool("both");
  return [
    queue(status),
    apart && station("prefill", "Prefill", much(latest.prompt_tokens_rate), "prompt tokens/s", busy(load("prefill")), workers(status, "prefill")),
    apart && station("handoff", "Hand-off", byteRate(latest.handoff_bytes_rate), "of KV blocks", handoffs(latest), landed(status.members)),
    apart && station("decode", "Decode", much(latest.completion_tokens_rate), "tokens/s", busy(load("decode")), workers(status, "decode")),
    pool("both") && station("both", "Prefill and decode", much(apart ? null : latest.completion_tokens_rate), "tokens/s", busy(load("both")), workers(status, "both")),
    station("answer", "First token", ms(latest.ttft_p50), "median", `${ms(latest.itl_p50)} between tokens`, h("p", { class: "workers" }, latest.ttft_p99 === null ? "no answers in the last 30 s" : `p95 ${ms(latest.ttft_p95)}, p99 ${ms(latest.ttft_p99)}`)),
  ];
}

function queue(status) {
  const depth = status.queue.reduce((total, of) => total + of.depth, 0);
  const classes = status.queue.filter((of) => of.depth > 0).map((of) => `class ${of.priority}: ${count(of.depth)}`);
  const detail = classes.length ? classes.join(", ") : `room for ${count(status.queue_limit)}`;
  return station("queue", "Queue", count(depth), "waiting", detail, h("p", { class: "workers" }, many(status.running, "request"), " running"));
}

function station(kind, title, value, unit, detail, extra) {
  const [number, of] = split(value);
  return h("li", { class: `station ${kind}${number === NONE || number === "0" ? " still" : ""}` },
    h("h3", null, title),
    h("p", { class: "big" }, h("span", { class: "number" }, number), h("span", { class: "unit" }, of ? ` ${of}` : "", " ", h("span", { class: "of" }, unit))),
    h("p", { class: "detail" }, detail), extra ?? null);
}

const sum = (members) => members.reduce((total, { load }) => ({
  running: total.running + (load?.running ?? 0), waiting: total.waiting + (load?.waiting ?? 0), reserved: total.reserved + (load?.reserved ?? 0),
}), { running: 0, waiting: 0, reserved: 0 });

const busy = ({ running, waiting, reserved }) =>
  [many(running, "sequence"), waiting && `${count(waiting)} waiting`, reserved && `${count(reserved)} reserved`].filter(Boolean).join(", ");

const handoffs = (latest) =>
  latest.handoff_rate ? `${rate(latest.handoff_rate)}, ${ms(latest.handoff_ms)} each` : "none in the last 2 s";

/** What has landed since the decode workers began. */
function landed(members) {
  const add = (field) => members.reduce((total, { load }) => total + (load?.totals?.[field] ?? 0), 0);
  return h("p", { class: "workers" }, `${count(add("handoffs"))} so far, ${bytes(add("handoff_bytes"))}`);
}

/** A dot for each worker that is or should be, and the numbers in words. */
function workers(status, role) {
  const pool = status.pools.find((known) => known.role === role);
  if (!pool) return h("p", { class: "workers" }, "no workers");
  const here = status.members.filter((member) => member.role === role).map((member) => member.state);
  const missing = Math.max(0, (pool.desired ?? 0) - here.length);
  const states = [...here.sort((one, other) => (one === "ready" ? 0 : 1) - (other === "ready" ? 0 : 1)), ...Array(missing).fill("missing")];
  const dots = states.length <= 16 ? h("span", { class: "dots", "aria-hidden": "true" }, states.map((state) => h("i", { class: state }))) : null;
  const words = `${pool.ready} of ${pool.desired ?? here.length} ready${pool.draining ? `, ${pool.draining} draining` : ""}`;
  return h("p", { class: "workers" }, dots, words);
}
