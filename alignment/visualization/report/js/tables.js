// Overview, differences, ratings and provenance: plain tables.

/** An interval as a small picture on a scale that the row's cells share. */
function track(one, low, high, colour, wide) {
  const at = (value) => (high > low ? (100 * (value - low)) / (high - low) : 50);
  const span = el("i");
  const mark = el("b");
  span.style.cssText = "left:" + at(one.low ?? one.value) + "%;width:" + (at(one.high ?? one.value) - at(one.low ?? one.value)) + "%";
  mark.style.left = at(one.value) + "%";
  span.style.background = mark.style.background = colour;
  return el("div", { class: wide ? "track wide" : "track", "aria-hidden": "true" }, span, mark);
}

function estimateCells(cells, unit, colours) {
  const known = cells.filter(Boolean);
  const low = Math.min(...known.map((one) => one.low ?? one.value));
  const high = Math.max(...known.map((one) => one.high ?? one.value));
  return cells.map((one, m) => {
    if (!one) return el("td", { class: "faint" }, "–");
    const title = one.rows === undefined ? null : count(one.rows) + " answers to " + count(one.prompts) + " prompts";
    return el("td", { title }, number(one.value, digits(unit)), el("small", null, interval(one.low, one.high, digits(unit))), track(one, low, high, colours[m]));
  });
}

function buildOverview(body) {
  const colours = data.models.map((_, m) => modelColour(m));
  const head = ["", ...data.models.map((model, m) => el("span", null, dot(colours[m]), model.name))];
  const rows = data.measures
    .filter((measure) => data.models.some((model) => model.estimates[measure.key]))
    .map((measure) => [
      measure.label + (measure.unit ? ", " + measure.unit : ""),
      ...estimateCells(data.models.map((model) => model.estimates[measure.key]), measure.unit, colours),
    ]);
  rows.unshift(["answers", ...data.models.map((model) => el("td", null, count(model.rows),
    el("small", null, model.unscored ? count(model.unscored) + " without score" : "")))]);
  body.replaceChildren(table(head, rows));
  body.append(el("p", { class: "faint" }, "In brackets: 95 % intervals, by bootstrap over prompts; none where prompts are too few. lambda = " + data.lambda_cost + ". " +
    "Read the safe ratio beside the safe-and-helpful share, refusals, lengths and distinct-n: refusing everything is safe as well."));
  for (const one of data.comparisons) body.append(...differences(one));
}

function differences(one) {
  const label = (row) => row.label + (row.unit ? ", " + row.unit : "");
  const rows = one.table.map((row) => {
    const places = digits(row.unit);
    const sure = row.low > 0 || row.high < 0;
    return [label(row), el("td", null, number(row.before, places)), el("td", null, number(row.after, places)),
      el("td", { class: sure ? "sure" : "faint" }, number(row.difference, places, true) + (sure ? (row.difference > 0 ? " ▲" : " ▼") : "")),
      el("td", null, interval(row.low, row.high, places, true) || "–"), el("td", { class: "faint" }, count(row.rows))];
  });
  return [el("details", null,
    el("summary", null, one.after + " against " + one.before + ", prompt by prompt"),
    table(["measure", one.before, one.after, "difference", "95 % interval", "pairs"], rows),
    el("p", { class: "faint" }, "▲ ▼: the interval leaves 0 out."))];
}

function buildRatings(body) {
  const { ratings } = data;
  if (!ratings) return body.replaceChildren(el("p", { class: "faint" }, "No ratings were given (--ratings, --judgments)."));
  body.replaceChildren(el("p", { class: "faint" }, "Method: " + [ratings.method, ratings.scale].filter(Boolean).join("; ") + ". In brackets: 95 % intervals, by bootstrap over prompts."));
  const pair = el("div", { class: "pair" });
  body.append(pair);
  for (const [dimension, part] of Object.entries(ratings.dimensions)) {
    const place = el("div");
    pair.append(place);
    const names = Object.keys(part.ratings).sort((a, b) => part.ratings[b].rating - part.ratings[a].rating);
    const all = names.flatMap((name) => [part.ratings[name].rating, part.ratings[name].low, part.ratings[name].high]).filter((v) => v !== null);
    const [low, high] = [Math.min(...all), Math.max(...all)];
    const published = names.some((name) => part.ratings[name].published);
    const rows = names.map((name) => {
      const one = part.ratings[name];
      const cells = [el("td", null, number(one.rating, 0), el("small", null, interval(one.low, one.high, 0))),
        el("td", null, track({ value: one.rating, low: one.low, high: one.high }, low, high, colourOf(name), true))];
      if (published) cells.push(el("td", { class: "faint" }, number(one.published, 0)));
      return [el("span", null, dot(colourOf(name)), name), ...cells];
    });
    place.append(el("h3", null, dimension[0].toUpperCase() + dimension.slice(1) + (part.prompts ? ", " + count(part.prompts) + " prompts" : "")),
      table(["", "rating", "", ...(published ? ["in the file"] : [])], rows));
    if (part.win_rates) place.append(winMatrix(names, part.win_rates));
    for (const text of [...(part.warnings || []), ...bias(part)]) place.append(el("p", { class: "faint" }, text));
  }
}

function winMatrix(names, rates) {
  const rows = names.map((name) => [
    el("span", null, dot(colourOf(name)), name),
    ...names.map((other) => {
      const one = name === other ? null : rates[name][other];
      if (!one || one.percent === null) return el("td", { class: "faint" }, one ? "–" : "");
      const cell = el("td", { title: one.comparisons + " comparisons" }, number(one.percent, 0) + " %",
        el("small", null, interval(one.low, one.high, 0)));
      const strength = Math.round(Math.abs(one.percent - 50) * 0.8);
      cell.style.background = "color-mix(in srgb, " + (one.percent >= 50 ? "#009e73 " : "#d55e00 ") + strength + "%, transparent)";
      return cell;
    }),
  ]);
  return el("div", null, el("p", { class: "faint" }, "Win rate of the row against the column, ties half:"), table(["", ...names], rows, { class: "wins" }));
}

function bias(part) {
  const lines = [];
  const first = part.position_bias && part.position_bias.first_wins;
  if (first) lines.push("The answer shown first wins " + number(first.value, 1) + " % " + interval(first.low, first.high, 1) + "; without bias 50 %." +
    (part.position_bias.not_asked ? " " + part.position_bias.not_asked + " comparisons of equal answers were not asked about and are left out." : ""));
  const share = part.agreement_with_scorer && part.agreement_with_scorer.share;
  if (share) lines.push("Judge and scorer prefer the same answer in " + number(share.value, 1) + " % " + interval(share.low, share.high, 1) +
    " of the pairs where both prefer one.");
  return lines;
}

function buildProvenance(body) {
  body.append(...data.provenance.map((one) => el("details", null, el("summary", null, one.title), el("pre", { class: "code" }, one.text))));
}
