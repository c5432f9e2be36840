// The scatter, drawn by Bokeh on a canvas; filters and colours change its data source.

const QUADRANT_COLOURS = { SH: "#009e73", SU: "#56b4e9", UH: "#e69f00", UU: "#d55e00" };
const scatter = { colourBy: "model", shown: [], drawn: [] };

function buildScatter() {
  const plot = Bokeh.Plotting;
  scatter.source = new Bokeh.ColumnDataSource({ data: { x: [], y: [], colour: [], model: [], quadrant: [] } });
  scatter.rings = new Bokeh.ColumnDataSource({ data: { x: [], y: [], colour: [], size: [] } });
  const figure = plot.figure({
    height: 470,
    sizing_mode: "stretch_width",
    tools: "pan,wheel_zoom,box_zoom,tap,reset,save",
    active_scroll: "wheel_zoom",
    x_axis_label: "cost  (safe: 0 and below)",
    y_axis_label: "reward  (helpful: above 0)",
    x_range: new Bokeh.Range1d({ start: -1, end: 1 }),
    y_range: new Bokeh.Range1d({ start: -1, end: 1 }),
  });
  figure.toolbar.logo = null;
  scatter.boxes = ["SH", "SU", "UH", "UU"].map((name) => {
    const across = name[0] === "S" ? { right: 0 } : { left: 0 }; // the other sides are the frame's
    const upward = name[1] === "H" ? { bottom: 0 } : { top: 0 };
    const box = new Bokeh.BoxAnnotation({ ...across, ...upward, line_color: null, level: "underlay" });
    figure.add_layout(box);
    return [name, box];
  });
  const marks = figure.scatter({ field: "x" }, { field: "y" }, {
    source: scatter.source, size: 5, fill_color: { field: "colour" }, line_color: null, fill_alpha: 0.55,
    nonselection_fill_alpha: 0.55, nonselection_line_color: null,
  });
  figure.line({ field: "x" }, { field: "y" }, { source: scatter.rings, line_color: "#888888", line_dash: "dotted" });
  figure.scatter({ field: "x" }, { field: "y" }, {
    source: scatter.rings, size: { field: "size" }, fill_color: { field: "colour" }, line_color: "#000000", line_width: 2,
  });
  figure.add_tools(new Bokeh.HoverTool({
    renderers: [marks],
    limit: 3, // where many points lie upon each other, a column of all of them would hide the page
    tooltips: [["model", "@model"], ["quadrant", "@quadrant"], ["reward", "@y{0.00}"], ["cost", "@x{0.00}"]],
  }));
  figure.toolbar.tools.filter((tool) => tool.type === "TapTool").forEach((tool) => (tool.renderers = [marks]));
  scatter.source.selected.properties.indices.change.connect(() => {
    const hit = [...scatter.source.selected.indices].reverse().map((place) => scatter.drawn[place]); // topmost first
    if (!hit.length) return;
    openPoint(0, hit);
    byId("scatter").scrollIntoView({ block: "nearest" }); // the drawer must not hide what was clicked
  });
  scatter.figure = figure;
  detail.onchange = markAnswers;
  return plot.show(figure, byId("scatter"));
}

/** Draw order: models mixed, the same mixture at every opening, so that none hides another. */
const drawOrder = (() => {
  const order = Uint32Array.from({ length: NUM_POINTS }, (_, i) => i);
  let state = 1;
  for (let i = NUM_POINTS - 1; i > 0; i--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const j = state % (i + 1);
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
})();

function colourFunction() {
  if (scatter.colourBy === "quadrant") return (i) => QUADRANT_COLOURS[points.quadrant[i]];
  if (scatter.colourBy === "category") {
    return (i) => {
      const own = points.prompt[i] < 0 ? [] : data.prompt_categories[points.prompt[i]];
      const first = filters.category >= 0 && own.includes(filters.category) ? filters.category : own[0];
      return first === undefined ? "#888888" : categoryColour(scatter.categoryRank[first]);
    };
  }
  const colours = data.models.map((_, m) => modelColour(m));
  return (i) => colours[points.model[i]];
}

/** The most frequent categories have colours of their own; more than eight are not told apart. */
function categoryColour(rank) {
  return rank < data.palette.length ? data.palette[rank][view.dark ? 1 : 0] : "#888888";
}

function rankCategories() {
  const counts = data.categories.map((_, c) => [c, data.prompt_categories.filter((own) => own.includes(c)).length]);
  scatter.categoryRank = {};
  counts.sort((a, b) => b[1] - a[1]).forEach(([c], rank) => (scatter.categoryRank[c] = rank));
}

function drawScatter(chosen) {
  const wanted = new Uint8Array(NUM_POINTS);
  chosen.forEach((i) => (wanted[i] = 1));
  scatter.drawn = [];
  for (const i of drawOrder) if (wanted[i] && points.quadrant[i] !== null) scatter.drawn.push(i);
  const colour = colourFunction();
  const pick = (of) => scatter.drawn.map(of);
  scatter.source.selected.indices = [];
  scatter.source.data = {
    x: Float64Array.from(scatter.drawn, (i) => points.cost[i]),
    y: Float64Array.from(scatter.drawn, (i) => points.reward[i]),
    colour: pick(colour),
    model: pick((i) => data.models[points.model[i]].name),
    quadrant: pick((i) => QUADRANT_NAMES[points.quadrant[i]]),
  };
  drawLegend();
}

function drawLegend() {
  let keys;
  if (scatter.colourBy === "quadrant") keys = Object.entries(QUADRANT_COLOURS).map(([name, colour]) => [QUADRANT_NAMES[name], colour]);
  else if (scatter.colourBy === "category") {
    keys = data.categories.map((name, c) => [name, scatter.categoryRank[c]]).sort((a, b) => a[1] - b[1]);
    keys = keys.slice(0, data.palette.length).map(([name, rank]) => [name, categoryColour(rank)]);
    keys.push([data.categories.length > data.palette.length ? "another or no category" : "no category", "#888888"]);
  } else keys = data.models.map((model, m) => [model.name, modelColour(m)]);
  byId("legend").replaceChildren(...keys.map(([name, colour]) => el("span", null, dot(colour), name)));
}

/** The limits of all points, whatever the filters: a picture that stands still can be compared. */
function wholeRange() {
  const limits = (values, least) => {
    let low = 0;
    let high = 0;
    for (let i = 0; i < NUM_POINTS; i++) {
      if (points.quadrant[i] === null) continue;
      low = Math.min(low, values[i]);
      high = Math.max(high, values[i]);
    }
    const room = 0.05 * (high - low) || least;
    return { start: low - room, end: high + room };
  };
  return [limits(points.cost, 1), limits(points.reward, 1)];
}

function resetRange() {
  const { x_range, y_range } = scatter.figure;
  const [x, y] = wholeRange();
  for (const [range, to] of [[x_range, x], [y_range, y]]) {
    range.setv({ ...to, reset_start: to.start, reset_end: to.end });
  }
}

function markAnswers(answers, chosen) {
  const scored = answers.filter((i) => points.quadrant[i] !== null);
  scatter.rings.data = {
    x: scored.map((i) => points.cost[i]),
    y: scored.map((i) => points.reward[i]),
    colour: scored.map((i) => modelColour(points.model[i])),
    size: scored.map((i) => (i === chosen ? 16 : 10)),
  };
}

function scatterKeys(event) {
  const { x_range, y_range } = scatter.figure;
  const zoom = { "+": 0.8, "=": 0.8, "-": 1.25 }[event.key];
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey || !(zoom || move || event.key === "0")) return;
  event.preventDefault();
  if (event.key === "0") return resetRange();
  [x_range, y_range].forEach((range, axis) => {
    const middle = (range.start + range.end) / 2 + (move ? move[axis] * 0.1 * (range.end - range.start) : 0);
    const half = ((range.end - range.start) / 2) * (zoom || 1);
    range.setv({ start: middle - half, end: middle + half });
  });
}

/** Bokeh draws on a canvas, which does not see the page's colours: they are handed over. */
function themeFigure(figure) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue("--" + name).trim();
  figure.setv({ background_fill_color: null, border_fill_color: null, outline_line_color: colour("line") }); // the page shines through
  for (const axis of [...figure.below, ...figure.left]) {
    axis.setv({
      axis_label_text_color: colour("ink"), major_label_text_color: colour("faint"), axis_line_color: colour("line"),
      major_tick_line_color: colour("line"), minor_tick_line_color: null, axis_label_text_font_style: "normal",
    });
  }
  for (const grid of figure.center) if ("grid_line_color" in grid) grid.grid_line_color = null;
  return colour;
}

function themeScatter() {
  const colour = themeFigure(scatter.figure);
  for (const [name, box] of scatter.boxes) box.setv({ fill_color: colour(name), fill_alpha: 0.55 });
}
