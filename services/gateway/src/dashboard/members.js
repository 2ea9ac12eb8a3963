// The workers, pool by pool: who is here and who is missing, what each is doing, how full its KV blocks are.

import { h, s } from "./dom.js";
import { bytes, count, many, member as shortened, ms, much } from "./units.js";

const TITLES = { prefill: "Prefill", decode: "Decode", both: "Prefill and decode", unknown: "Unknown role" };

export function pools(status) {
  const roles = [...new Set([...status.pools, ...status.members, ...status.lost].map((of) => of.role))];
  if (roles.length === 0) return [h("p", { class: "empty" }, "No worker has joined yet.")];
  return roles.map((role) => pool(role, status));
}

function pool(role, status) {
  const told = status.pools.find((known) => known.role === role);
  const members = [...status.members, ...status.lost].filter((member) => member.role === role);
  return h("div", { class: `pool ${role}` },
    h("h3", null, h("span", { class: "swatch", "aria-hidden": "true" }), TITLES[role] ?? role, h("span", { class: "count" }, told ? size(told) : "")),
    members.length ? table(TITLES[role] ?? role, members) : h("p", { class: "empty" }, "No worker of this pool is here."));
}

const size = ({ desired, ready, draining }) =>
  `${desired === null ? `${ready} ready` : `${ready} of ${desired} ready`}${draining ? `, ${draining} draining` : ""}`;

const table = (title, members) => h("table", { class: "members" },
  h("caption", { class: "unseen" }, `${title} workers`),
  h("thead", null, h("tr", null, ["Worker", "State", "Sequences", "KV blocks", "Since it began"].map((name) => h("th", { scope: "col" }, name)))),
  h("tbody", null, members.map(row)));

function row(member) {
  const gone = member.state === "missing";
  return h("tr", { class: gone ? "gone" : null, "data-member": member.id },
    h("th", { scope: "row" }, h("span", { class: "name", title: member.id }, shortened(member.id)),
      h("span", { class: "sub" }, `${member.backend} · ${member.version} · pid ${member.pid}`), h("span", { class: "sub" }, member.address.replace(/^http:\/\//, ""))),
    h("td", { "data-label": "State" }, h("span", { class: `chip ${member.state}` }, member.state),
      gone ? h("span", { class: "sub" }, `last seen ${ms(member.lost_ms)} ago`) : leave(member)),
    gone || !member.load ? [1, 2, 3].map(() => h("td", { class: "nothing" }, "")) : [sequences(member), blocks(member.load), done(member.load.totals)]);
}

/** Seen by who has given the admin token (orders.js). */
const leave = ({ id, draining }) => draining ? null
  : h("button", { class: "quiet drain", type: "button", "data-drain": id, "aria-label": `Drain ${shortened(id)}` }, "Drain");

function sequences({ load, max_sequences: most }) {
  const detail = [load.waiting && `${count(load.waiting)} waiting`, load.reserved && `${count(load.reserved)} reserved`].filter(Boolean).join(", ");
  return h("td", { "data-label": "Sequences" }, h("span", { class: "figure" }, h("b", null, count(load.running)), ` of ${count(most)}`),
    bar([["used", load.running], ["free", Math.max(0, most - load.running)]]), h("span", { class: "sub" }, detail || "none waiting"));
}

function blocks(load) {
  const quarantined = load.blocks_quarantined;
  const used = Math.max(0, load.blocks_total - load.blocks_free - quarantined);
  const free = load.blocks_free - load.blocks_cached;
  const words = [`${count(load.blocks_cached)} cached`, `${count(free)} free`, quarantined && `${count(quarantined)} quarantined`].filter(Boolean).join(" · ");
  return h("td", { "data-label": "KV blocks", class: "blocks" },
    h("span", { class: "figure" }, h("b", null, count(used)), ` used of ${count(load.blocks_total)}`),
    bar([["used", used], ["cached", load.blocks_cached], ["quarantined", quarantined], ["free", free]]), h("span", { class: "sub" }, words));
}

function done(totals) {
  if (!totals) return h("td", { "data-label": "Since it began" }, "");
  const tokens = totals.completion_tokens + totals.prompt_tokens;
  const parts = [totals.handoffs ? `${many(totals.handoffs, "hand-off")} in, ${bytes(totals.handoff_bytes)}` : null];
  return h("td", { "data-label": "Since it began" }, h("span", { class: "figure" }, h("b", null, much(tokens)), " tokens"),
    parts[0] ? h("span", { class: "sub" }, parts[0]) : null);
}

/** Parts of a whole, side by side. The words beside it say the same. */
function bar(parts) {
  const whole = parts.reduce((total, [, value]) => total + value, 0) || 1;
  let x = 0;
  const rects = parts.filter(([, value]) => value > 0).map(([kind, value]) => {
    const width = (value / whole) * 100;
    const rect = s("rect", { class: kind, x: x.toFixed(2), y: 0, width: width.toFixed(2), height: 6 });
    x += width;
    return rect;
  });
  return s("svg", { class: "bar", viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" }, rects);
}
