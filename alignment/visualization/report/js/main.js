// Filters, movers, disagreements, and the order in which the page comes to life.

const list = pagedList(byId("list"),
  (i) => [
    el("span", null, dot(modelColour(points.model[i])), data.models[points.model[i]].name, " "), quadrantTag(points.quadrant[i]),
    el("small", null, "  R " + number(points.reward[i]) + "  C " + number(points.cost[i])), promptLine(points.prompt[i], filters.needle)],
  openPoint);

function refresh() {
  const chosen = passing();
  const drawn = chosen.filter((i) => points.quadrant[i] !== null).length;
  const undrawn = chosen.length - drawn;
  byId("count").textContent = count(chosen.length) + " of " + count(NUM_POINTS) + " answers" +
    (undrawn ? ", " + count(undrawn) + " of them without a score and not in the picture" : "");
  drawScatter(chosen);
  list.set(sorted(chosen));
}

const ORDERS = {
  file: ["order of the files"],
  costly: ["highest cost first", "cost", -1],
  harmless: ["lowest cost first", "cost", 1],
  helpful: ["highest reward first", "reward", -1],
  unhelpful: ["lowest reward first", "reward", 1],
  long: ["longest first", "words", -1],
};
let order = "file";

/** What has no value comes last. */
function sorted(chosen) {
  const [, key, sign] = ORDERS[order];
  if (!key) return chosen;
  const rank = (i) => (points[key][i] === null ? Infinity : sign * points[key][i]);
  return [...chosen].sort((i, j) => (rank(i) === rank(j) ? i - j : rank(i) - rank(j)));
}

function buildFilters() {
  const toggle = (set, value) => (event) => {
    if (event.target.checked) set.add(value);
    else set.delete(value);
    refresh();
  };
  const box = (set, value, ...label) => el("label", null, el("input", { type: "checkbox", checked: true, onchange: toggle(set, value) }), ...label);
  const changed = (key, read) => (event) => {
    filters[key] = read(event.target.value);
    refresh();
  };
  let waiting = 0;
  const typed = (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => changed("needle", (text) => text.toLowerCase())(event), 200);
  };
  const option = (value, text, selected) => el("option", { value, selected }, text);
  const group = (text, boxes) => el("div", { role: "group", class: text, "aria-label": text }, el("small", null, text), el("div", null, ...boxes));
  const over = (text, control) => el("label", { class: "over" }, text, control);
  const atLeast = (fallback) => (text) => (text === "" ? fallback : Number(text));
  const colours = [["model", "model"], ["quadrant", "quadrant"], ...(data.categories.length ? [["category", "category"]] : [])];
  const hasUnscored = points.quadrant.includes(null);
  byId("filters").append(
    group("models", data.models.map((model, m) => box(filters.models, m, dot(modelColour(m)), model.name))),
    group("quadrants", [...Object.keys(QUADRANT_NAMES), ...(hasUnscored ? [null] : [])].map((name) => box(filters.quadrants, name, quadrantTag(name)))),
    over("text", el("input", { type: "search", id: "search", placeholder: "words in prompt or answer", oninput: typed })),
    over("in", el("select", { onchange: changed("where", String) }, option("both", "both"), option("prompt", "prompts"), option("response", "answers"))),
    ...(data.categories.length
      ? [over("category", el("select", { id: "category", onchange: changed("category", Number) }, option(-1, "all"), ...data.categories.map((name, c) => option(c, name))))]
      : []),
    over("words, from", el("input", { type: "number", min: 0, id: "fewest", oninput: changed("fewest", atLeast(0)) })),
    over("to", el("input", { type: "number", min: 0, id: "most", oninput: changed("most", atLeast(Infinity)) })),
    over("colour by", el("select", { id: "colour-by", onchange: (event) => { scatter.colourBy = event.target.value; refresh(); } },
      ...colours.map(([value, text]) => option(value, text)))),
    over("list", el("select", { id: "order", onchange: (event) => { order = event.target.value; refresh(); } },
      ...Object.entries(ORDERS).map(([value, [text]]) => option(value, text)))),
  );
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
}

function buildMovers(body) {
  if (NUM_MODELS < 2) return body.append(el("p", { class: "faint" }, "This needs two models."));
  const choose = (id, start) => el("select", { id, onchange: () => fill() },
    ...data.models.map((model, m) => el("option", { value: m, selected: m === start }, model.name)));
  const from = choose("mover-from", 0);
  const to = choose("mover-to", NUM_MODELS - 1);
  const matrix = el("div");
  const head = el("p", { role: "status" });
  const rows = el("div");
  body.append(el("p", null, el("label", null, "from ", from), " ", el("label", null, "to ", to)), matrix, head, rows);
  const names = Object.keys(QUADRANT_NAMES);
  const places = () => [Number(from.value), Number(to.value)];
  const movers = pagedList(rows, (prompt) => {
    const [a, b] = places().map((m) => answerAt[prompt * NUM_MODELS + m]);
    return [quadrantTag(points.quadrant[a]), " → ", quadrantTag(points.quadrant[b]),
      el("small", null, "  R " + number(points.reward[b] - points.reward[a], 2, true) + "  C " + number(points.cost[b] - points.cost[a], 2, true)),
      promptLine(prompt, "")];
  }, (place, items) => openPoint(place, items.map((prompt) => answerAt[prompt * NUM_MODELS + places()[1]])));
  function fill() {
    const [a, b] = places();
    const cells = {};
    for (let p = 0; p < NUM_PROMPTS; p++) {
      const [i, j] = [answerAt[p * NUM_MODELS + a], answerAt[p * NUM_MODELS + b]];
      if (i >= 0 && j >= 0 && points.quadrant[i] && points.quadrant[j]) (cells[points.quadrant[i] + points.quadrant[j]] ??= []).push(p);
    }
    const change = (p) => Math.abs(points.cost[answerAt[p * NUM_MODELS + b]] - points.cost[answerAt[p * NUM_MODELS + a]]);
    const show = (items, text) => {
      head.textContent = text;
      movers.set([...items].sort((p, q) => change(q) - change(p)));
    };
    const cell = (x, y) => {
      const items = cells[x + y] || [];
      const text = count(items.length) + " prompts: " + QUADRANT_NAMES[x] + " with " + data.models[a].name + ", " + QUADRANT_NAMES[y] + " with " + data.models[b].name;
      return el("td", { class: x === y ? "same" : null },
        el("button", { type: "button", disabled: !items.length, "aria-label": text, "data-cell": x + y, onclick: () => show(items, text) }, count(items.length)));
    };
    matrix.replaceChildren(table(["rows: " + data.models[a].name + ", columns: " + data.models[b].name, ...names.map(quadrantTag)],
      names.map((x) => [quadrantTag(x), ...names.map((y) => cell(x, y))]), { class: "matrix" }));
    const moved = Object.entries(cells).filter(([key]) => key.slice(0, 2) !== key.slice(2)).flatMap(([, items]) => items);
    const paired = Object.values(cells).reduce((sum, items) => sum + items.length, 0);
    show(moved, count(moved.length) + " of " + count(paired) + " prompts that both answered changed quadrant; largest change of cost first");
  }
  fill();
}

function buildDisagreements(body) {
  const dimensions = Object.entries(data.disagreements);
  if (!dimensions.length) return body.append(el("p", { class: "faint" }, "No judgments on these answers were given (--judgments)."));
  const model = (name) => data.models.findIndex((one) => one.name === name);
  for (const [dimension, part] of dimensions) {
    const scorer = dimension === "helpfulness" ? "reward" : "−cost";
    const list = el("div");
    body.append(el("h3", null, dimension[0].toUpperCase() + dimension.slice(1)),
      el("p", null, count(part.total) + " of " + count(part.judged) + " judged pairs whose answers are here; " +
        (part.rows.length < part.total ? "the " + part.rows.length + " strongest, by both differences" : "strongest first")), list);
    const gap = (one, who) => one.models.map((name, k) => name + " " + number(one[who][k])).join(" : ");
    const verdicts = (one) => [el("strong", null, "judge "), gap(one, "judge"), el("small", null, "   " + scorer + " " + gap(one, "scorer"))];
    const words = (one) => el("details", null, el("summary", null, "show the judge's words"),
      ...one.replies.flatMap((reply) => [el("p", { class: "faint" }, "A is " + reply.shown_first), el("div", { class: "plain", dir: "auto" }, reply.text)]));
    const preferred = (one) => one.models[one.judge[0] > one.judge[1] ? 0 : 1];
    pagedList(list, (one) => [...verdicts(one), promptLine(one.prompt, "")], (place, items) => openPoint(
      place,
      items.map((one) => answerAt[one.prompt * NUM_MODELS + model(preferred(one))]),
      (at) => el("div", null, el("p", null, ...verdicts(items[at])), words(items[at])),
    )).set(part.rows);
  }
}

function setTheme(dark) {
  view.dark = dark;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme-button").setAttribute("aria-pressed", dark);
}

function recolour() {
  themeScatter();
  buildOverview(document.querySelector("#overview .body"));
  buildRatings(document.querySelector("#ratings .body"));
  document.querySelectorAll("#filters .models .dot").forEach((node, m) => (node.style.background = modelColour(m)));
  drawScatter(list.items);
  lists.forEach((one) => one.draw());
  if (curveViews.length) drawCurves();
  showDetail();
}

function pressed(id, change) {
  byId(id).addEventListener("click", (event) => {
    const on = event.currentTarget.getAttribute("aria-pressed") !== "true";
    event.currentTarget.setAttribute("aria-pressed", on);
    change(on);
  });
}

async function start() {
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
  const body = (id) => document.querySelector("#" + id + " .body");
  byId("nav").append(...[...document.querySelectorAll("main > section")].map((one) => el("a", { href: "#" + one.id }, one.dataset.nav)));
  byId("notes").append(...data.notes.map((text) => el("li", null, text)));
  byId("notes").hidden = !data.notes.length;
  buildOverview(body("overview"));
  buildFilters();
  rankCategories();
  const shown = buildScatter();
  resetRange();
  themeScatter();
  loadTexts();
  refresh();
  buildMovers(body("movers"));
  buildCurves(body("curves"));
  buildRatings(body("ratings"));
  buildDisagreements(body("disagreements"));
  buildProvenance(body("provenance"));
  pressed("theme-button", (on) => { setTheme(on); recolour(); });
  pressed("prompts-button", (on) => { view.promptsShown = on; lists.forEach((one) => one.draw()); showDetail(); });
  pressed("unsafe-button", (on) => { view.unsafeUnfolded = on; showDetail(); });
  byId("scatter").addEventListener("keydown", scatterKeys);
  document.addEventListener("keydown", (event) => {
    if (!detail.steps) return;
    if (event.key === "Escape") closeDetail();
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by && byId("detail").contains(event.target)) step(by);
  });
  await shown;
  requestAnimationFrame(() => setTimeout(() => (document.documentElement.dataset.ready = Math.round(performance.now()))));
}

start();
