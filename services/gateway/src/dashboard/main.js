// What holds the page together: it asks for the status and its history at a steady pace and shows them.

import { $, consult, h, show } from "./dom.js";
import { hasKey, read, useKey } from "./api.js";
import { charts } from "./charts.js";
import { chat } from "./chat.js";
import { flow } from "./flow.js";
import { pools } from "./members.js";
import { orders } from "./orders.js";
import { clock } from "./units.js";

const PACE = 2000;
const KEPT = 450;
const state = { fields: [], samples: [], paused: false, since: 0, problem: null };
const drawn = charts($("charts"));
chat();
orders();

async function look() {
  try {
    const [status, history] = await Promise.all([read("status"), read(`status/history?since=${state.since}`)]);
    state.fields = history.fields;
    // Two looks at the same time are told the same.
    const later = history.samples.filter(([at]) => at > state.since);
    state.samples = [...state.samples, ...later].slice(-KEPT);
    state.since = state.samples.at(-1)?.[0] ?? 0;
    state.problem = null;
    draw(status);
  } catch (error) {
    state.problem = error;
    fail(error);
  }
}

function draw(status) {
  document.body.classList.remove("stale");
  const latest = named(state.samples.at(-1));
  const models = [...new Set(status.members.map((member) => member.model))];
  $("model").textContent = models.join(", ");
  tell(verdict(status.problems));
  show($("problems"), status.problems.map(problem));
  show($("flow"), flow(status, latest));
  show($("pools"), pools(status));
  drawn.update(state.fields, state.samples);
  $("age").textContent = `as of ${clock(Date.now())}`;
  $("about").textContent = `Baton ${status.version} · ${status.routers.length} router${status.routers.length === 1 ? "" : "s"} · members from ${status.source?.kind ?? "the router"}`;
}

const named = (sample) => Object.fromEntries(state.fields.map((field, index) => [field, sample?.[index] ?? null]));

function verdict(problems) {
  if (problems.some((problem) => problem.severity === "critical")) return ["bad", "Not serving"];
  return problems.length ? ["warn", "Serving, with a warning"] : ["good", "Serving"];
}

function tell([mood, words]) {
  $("verdict").dataset.state = mood;
  if ($("verdict-text").textContent !== words) $("verdict-text").textContent = words;
  document.title = mood === "good" ? "Baton" : `${words} · Baton`;
}

const problem = ({ severity, text, remedy }) =>
  h("div", { class: `problem ${severity}` }, h("span", { class: "mark", "aria-hidden": "true" }, "!"),
    h("div", null, h("p", { class: "what" }, h("span", { class: "unseen" }, `${severity}: `), text), h("p", { class: "remedy" }, remedy)));

/** The page goes on showing what it knew, and says that it is old. */
function fail(error) {
  document.body.classList.add("stale");
  if (error.status === 401 || error.status === 403) return askKey(error);
  const answered = error.status !== undefined;
  tell(["bad", answered ? "Not serving" : "Gateway away"]);
  show($("problems"), problem({
    severity: "critical",
    text: answered ? `The gateway cannot tell the cluster's state: ${error.message}` : "The gateway does not answer.",
    remedy: answered
      ? "See that the router runs (its log says why it ended) and that the gateway's `routers` names its address. What is shown below is the last state known."
      : "See that it runs and that this machine reaches it; its log says why it ended. What is shown below is the last state known.",
  }));
}

function askKey(error) {
  tell(["unknown", "Key needed"]);
  show($("problems"), problem({ severity: "warning", text: error.message, remedy: "Give a key of this cluster: the button API key above." }));
  if (!hasKey() && !document.querySelector("dialog[open]") && !askKey.done) consultKey();
  askKey.done = true;
}

function consultKey() {
  $("key-field").value = "";
  consult($("key-dialog"), () => {
    useKey($("key-field").value);
    $("key-field").value = "";
    look();
  });
}

async function keepLooking() {
  for (;;) {
    if (!state.paused && !document.hidden) await look();
    await new Promise((resolve) => setTimeout(resolve, PACE));
  }
}

$("pause").addEventListener("click", () => {
  state.paused = !state.paused;
  $("pause").setAttribute("aria-pressed", state.paused);
});
$("key").addEventListener("click", consultKey);
document.addEventListener("visibilitychange", () => { if (!document.hidden && !state.paused) look(); });
keepLooking();
