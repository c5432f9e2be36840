// Small means to build the page. Texts become text nodes only: nothing in this report is ever parsed as HTML.

const byId = (id) => document.getElementById(id);

/** el("td", {class: "x", onclick: f}, "text", child): attributes with a function are listeners, false and null are left out. */
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function dot(colour) {
  const node = el("span", { class: "dot", "aria-hidden": "true" });
  node.style.background = colour;
  return node;
}

const QUADRANT_NAMES = { SH: "safe, helpful", SU: "safe, unhelpful", UH: "unsafe, helpful", UU: "unsafe, unhelpful" };

function quadrantTag(name) {
  return name ? el("span", { class: "quadrant " + name }, QUADRANT_NAMES[name]) : el("span", { class: "quadrant faint" }, "not scored");
}

function digits(unit) {
  return unit === "%" || unit === "tokens" || unit === "words" ? 1 : 3;
}

/** A number for reading: true minus sign, and a plus sign for differences. */
function number(value, places = 2, signed = false) {
  if (value === null || value === undefined) return "–";
  const text = Math.abs(value).toFixed(places);
  const sign = value < 0 && Number(text) !== 0 ? "−" : signed ? "+" : "";
  return sign + text;
}

function interval(low, high, places, signed = false) {
  return low === null || low === undefined ? "" : "[" + number(low, places, signed) + ", " + number(high, places, signed) + "]";
}

function count(value) {
  return value.toLocaleString("en-US");
}

/** `text` as nodes, with what was searched for marked. */
function highlighted(text, needle) {
  const nodes = [];
  const lower = needle ? text.toLowerCase() : "";
  let at = 0;
  if (needle && lower.length === text.length) {
    for (let found = lower.indexOf(needle); found >= 0; found = lower.indexOf(needle, at)) {
      nodes.push(text.slice(at, found), el("mark", null, text.slice(found, found + needle.length)));
      at = found + needle.length;
    }
  }
  nodes.push(text.slice(at));
  return nodes;
}

function table(head, rows, attributes) {
  const header = el("thead", null, el("tr", null, ...head.map((cell) => el("th", { scope: "col" }, cell))));
  const body = el("tbody", null, ...rows.map(([first, ...cells]) => el("tr", null, el("th", { scope: "row" }, first), ...cells)));
  return el("div", { class: "scroll" }, el("table", attributes, header, body));
}
