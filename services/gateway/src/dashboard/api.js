// Asking the gateway, with the key that was given, if any. Addresses are relative: the page works below any path.

const KEY = "baton-key";
let key = (() => { try { return sessionStorage.getItem(KEY) ?? ""; } catch { return ""; } })();

export const hasKey = () => key !== "";

export function useKey(given) {
  key = given.trim();
  try { key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY); } catch { /* kept for this page alone */ }
}

/** Why the gateway refused: OpenAI's error shape, or whatever it said. */
export class Refused extends Error {
  constructor(status, { message, code }) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key && !headers.authorization) headers.authorization = `Bearer ${key}`;
  const response = await fetch(path, { cache: "no-store", ...options, headers });
  if (!response.ok) throw new Refused(response.status, reason(await response.text(), response.status));
  return response;
}

export const read = async (path) => (await ask(path, { signal: AbortSignal.timeout(8000) })).json();

function reason(text, status) {
  try {
    const { message, code } = JSON.parse(text).error;
    return { message, code };
  } catch { return { message: text.trim() || `HTTP ${status}` }; }
}
