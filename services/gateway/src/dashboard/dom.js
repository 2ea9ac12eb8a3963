// Elements of the page: making them, and bringing those that are there up to date without losing focus or selection.

export const $ = (id) => document.getElementById(id);

/** An HTML element. Attributes that are null, undefined or false are left out. */
export const h = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);

/** An SVG element. */
export const s = (name, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/**
 * Opens a dialog, and calls `done` once it is closed by the button with a value: not by Cancel, and not by Esc, which would leave the
 * value of the last time. Cancel is no button of the form, for Enter in a field presses the first of those.
 */
export function consult(dialog, done) {
  dialog.returnValue = "";
  dialog.onclose = () => { if (dialog.returnValue) done(); };
  dialog.querySelector(".cancel").onclick = () => dialog.close();
  dialog.showModal();
}

/** Makes what is in `parent` look like `children`, touching only what differs. For content without listeners. */
export function show(parent, ...children) {
  const fresh = children.flat().filter((child) => child !== null && child !== undefined && child !== false);
  fresh.forEach((child, index) => {
    const node = typeof child === "string" ? document.createTextNode(child) : child;
    const old = parent.childNodes[index];
    if (old) become(old, node);
    else parent.append(node);
  });
  while (parent.childNodes.length > fresh.length) parent.lastChild.remove();
}

function become(old, fresh) {
  if (old.nodeName !== fresh.nodeName) return old.replaceWith(fresh);
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  show(old, ...fresh.childNodes);
}
