// Numbers as people read them.

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const NONE = "–";

/** Three digits that matter: 0.52, 5.2, 52, 520. */
function short(value) {
  return value >= 100 || Number.isInteger(value) ? plain.format(value) : value.toFixed(value >= 10 ? 0 : value >= 1 ? 1 : 2);
}

const known = (write) => (value) => (value === null || value === undefined || Number.isNaN(value) ? NONE : write(value));

export const count = known((value) => plain.format(value));
export const much = known((value) =>
  value >= 1e9 ? `${short(value / 1e9)} G` : value >= 1e6 ? `${short(value / 1e6)} M` : value >= 1e4 ? `${short(value / 1e3)} k` : short(value));
export const ms = known((value) =>
  value >= 60_000 ? `${short(value / 60_000)} min` : value >= 1000 ? `${short(value / 1000)} s` : `${short(value)} ms`);
export const bytes = known((value) =>
  value >= 1e9 ? `${short(value / 1e9)} GB` : value >= 1e6 ? `${short(value / 1e6)} MB` : value >= 1e3 ? `${short(value / 1e3)} kB` : `${short(value)} B`);
export const rate = (value) => (much(value) === NONE ? NONE : `${much(value)}/s`);
export const byteRate = (value) => (bytes(value) === NONE ? NONE : `${bytes(value)}/s`);

export const many = (number, one, more = `${one}s`) => `${count(number)} ${number === 1 ? one : more}`;

/** "55 ms" in two pieces, so that the unit can be smaller. */
export const split = (text) => {
  const [value, unit] = text.split(" ");
  return [value, unit ?? ""];
};

/** A member's name without the bulk of its id. */
export const member = (id) => (id ? id.replace(/^([a-z]+-[0-9a-f]{6})[0-9a-f-]{20,}$/, "$1") : NONE);

export const clock = (at) => new Date(at).toLocaleTimeString("en-GB");
