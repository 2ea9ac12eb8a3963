// Orders to workers. The page changes nothing until it is given the admin token, which it keeps for as long as it is open and
// no longer; then each worker has a button to have it leave, and says what is meant before it is done.

import { $, consult, show } from "./dom.js";
import { ask } from "./api.js";
import { member } from "./units.js";

let token = "";

export function orders() {
  $("operate").addEventListener("click", () => (token ? forget("The page changes nothing any more.") : askToken()));
  $("pools").addEventListener("click", ({ target }) => {
    const id = target.closest("button[data-drain]")?.dataset.drain;
    if (id) confirm(id);
  });
}

function askToken() {
  $("token-field").value = "";
  consult($("token-dialog"), () => {
    use($("token-field").value.trim());
    $("token-field").value = "";
  });
}

function use(given) {
  if (!given) return;
  token = given;
  mark();
  tell("Each worker has a button now that has it leave.");
}

function forget(words, failed) {
  token = "";
  mark();
  tell(words, failed);
}

/** The buttons are there always, and seen when they would do something. */
function mark() {
  document.body.classList.toggle("operates", token !== "");
  $("operate").setAttribute("aria-pressed", token !== "");
}

function confirm(id) {
  $("drain-title").textContent = `Have ${member(id)} leave?`;
  $("drain-member").textContent = id;
  consult($("drain-dialog"), () => drain(id));
}

async function drain(id) {
  tell(`Telling ${member(id)} to leave.`);
  try {
    await ask(`status/members/${encodeURIComponent(id)}/drain`, {
      method: "POST",
      headers: { authorization: `Bearer ${token}` },
      signal: AbortSignal.timeout(15_000),
    });
    tell(`${member(id)} takes nothing new. It ends once what runs there has ended or goes on elsewhere.`);
  } catch (error) {
    const words = failure(id, error);
    if (error.status === 401) forget(words, true);
    else tell(words, true);
  }
}

/** Refused is what a gateway or a worker said no to; what else it says tells itself whether the order went out. */
function failure(id, { status, code, message }) {
  if (code === "worker_refused" || (status >= 400 && status < 500)) return `Refused: ${message}.`;
  return code ? `${message}.` : `The gateway did not answer: whether ${member(id)} was told is not known.`;
}

function tell(words, failed = false) {
  $("ordered").classList.toggle("failure", failed);
  show($("ordered"), words);
}
