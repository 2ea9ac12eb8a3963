// The chat: asks the cluster as any client would, shows the answer as it comes, and then who gave it and where its
// time went. Stopping drops the stream, which frees everything behind it.

import { $, h, show } from "./dom.js";
import { ask, read } from "./api.js";
import { count, many, member, ms, rate } from "./units.js";
import { waterfall } from "./waterfall.js";

const EXAMPLES = ["What does `Vec::push` do?", "What does `Option::map` do?", "What does `str::trim` do?"];
const talk = { messages: [], running: null };
// It leaves the page with the first question, and comes back with a new chat.
const welcome = $("welcome");

export function chat() {
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop(); });
  $("stop").addEventListener("click", stop);
  $("forget").addEventListener("click", forget);
  $("examples").append(...EXAMPLES.map((question) => h("button", { type: "button", class: "example", click: () => send(question) }, prose(question))));
  models();
}

async function models() {
  try {
    const { data } = await read("v1/models");
    show($("models"), data.map(({ id }) => h("option", { value: id }, id)));
  } catch { setTimeout(models, 2000); }
}

function stop() { talk.running?.abort(); }

function forget() {
  stop();
  talk.messages = [];
  show($("log"), welcome);
  $("forget").hidden = true;
  $("question").focus();
}

async function send(given) {
  const question = (given ?? $("question").value).trim();
  if (!question || talk.running) return;
  $("question").value = "";
  welcome.remove();
  $("forget").hidden = false;
  // A new chat may begin meanwhile: this answer belongs to the one that it was asked in.
  const messages = talk.messages;
  messages.push({ role: "user", content: question });
  const answer = new Answer();
  $("log").append(h("article", { class: "said user", "aria-label": "You" }, prose(question)), answer.article);
  await run(answer, messages);
  $("question").focus();
  await answer.explain();
}

async function run(answer, messages) {
  talk.running = new AbortController();
  busy(true);
  answer.scroll();
  try {
    await answer.stream(body(messages), talk.running.signal);
  } catch (error) {
    answer.end(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  }
  if (answer.text) messages.push({ role: "assistant", content: answer.text });
  else messages.pop();
  talk.running = null;
  busy(false);
}

const body = (messages) => ({
  model: $("models").value,
  messages,
  stream: true,
  stream_options: { include_usage: true },
  max_tokens: Number($("max-tokens").value) || 256,
  temperature: Number($("temperature").value) || 0,
});

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("log").setAttribute("aria-busy", is);
}

/** One answer: its text, and below it what is known of how it came about. */
class Answer {
  constructor() {
    this.text = "";
    this.words = h("div", { class: "words" }, h("span", { class: "waits" }, "…"));
    this.facts = h("div", { class: "facts" });
    this.article = h("article", { class: "said cluster", "aria-label": "The cluster" }, this.words, this.facts);
  }

  async stream(request, signal) {
    const asked = performance.now();
    const response = await ask("v1/chat/completions", { method: "POST", body: JSON.stringify(request), headers: { "content-type": "application/json" }, signal });
    this.id = response.headers.get("x-request-id");
    this.prefill = response.headers.get("x-baton-prefill");
    this.decode = response.headers.get("x-baton-decode");
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices?.[0]?.delta?.content;
      if (delta) this.add(delta, asked);
      if (event.usage) this.usage = event.usage;
    }
    this.last = performance.now();
  }

  add(delta, asked) {
    this.first ??= performance.now();
    this.waited ??= this.first - asked;
    this.text += delta;
    show(this.words, ...prose(this.text));
    this.scroll();
  }

  end(words, failed) {
    if (!this.text) show(this.words);
    this.words.append(h("p", { class: failed ? "failure" : "stopped", role: failed ? "alert" : null }, words));
  }

  async explain() {
    if (!this.text && this.words.querySelector(".waits")) show(this.words, h("p", { class: "stopped" }, "An answer without text."));
    if (!this.id) return;
    show(this.facts, this.path(), this.speed());
    const trace = await recorded(this.id);
    this.facts.append(...waterfall(trace));
    this.scroll();
  }

  path() {
    if (!this.prefill && !this.decode) return h("p", { class: "path" }, "Ended before a worker took it.");
    const name = (kind, id) => h("span", { class: `worker ${kind}`, title: id }, member(id));
    return this.prefill === this.decode
      ? h("p", { class: "path" }, "served by ", name("both", this.decode))
      : h("p", { class: "path" }, name("prefill", this.prefill), h("span", { class: "arrow", "aria-label": "handed to" }, "→"), name("decode", this.decode));
  }

  speed() {
    const tokens = this.usage?.completion_tokens;
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    const seconds = (this.last - this.first) / 1000;
    const facts = [
      this.waited !== undefined && ["first token here", ms(this.waited)],
      tokens !== undefined && ["answer", many(tokens, "token")],
      tokens > 1 && seconds > 0 && ["speed", rate((tokens - 1) / seconds)],
      this.usage && ["prompt", `${many(this.usage.prompt_tokens, "token")}${cached ? `, ${count(cached)} cached` : ""}`],
    ].filter(Boolean);
    return h("dl", { class: "speed" }, facts.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))));
  }

  scroll() { $("log").scrollTop = $("log").scrollHeight; }
}

/** The gateway's record of the request, which is there once the answer has ended; or why there is none. */
async function recorded(id) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await read(`trace/${encodeURIComponent(id)}`);
    } catch (error) {
      if (error.status !== 404 || attempt === 4) return { missing: error.status === 404 ? null : error.message };
      await new Promise((resolve) => setTimeout(resolve, 100 * attempt));
    }
  }
}

/** Server-sent events as they come; comments are left out. Ends with the connection, for only then is the request's record made. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, over] = ["", false];
  for (;;) {
    const { value, done } = await reader.read();
    if (done && over) return;
    if (done) throw new Error("The connection ended before the answer did.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      over ||= line === "data: [DONE]";
      if (!over && line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

/** Text with `code` and ``` blocks; nothing of it is taken as HTML. */
function prose(text) {
  return text.split(/(```[\s\S]*?(?:```|$)|`[^`\n]+`)/).filter(Boolean).map((part) => {
    if (part.startsWith("```")) return h("pre", { tabindex: 0 }, h("code", null, part.replace(/^```\w*\n?|```$/g, "")));
    if (part.startsWith("`") && part.length > 2) return h("code", null, part.slice(1, -1));
    return h("span", null, part);
  });
}
