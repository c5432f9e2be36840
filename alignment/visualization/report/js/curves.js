// Training curves: one Bokeh figure a panel, drawn when the section comes into sight.

const curveViews = []; // promises of what is drawn, to be taken away when it is drawn anew

function buildCurves(body) {
  const { curves } = data;
  if (!curves) return body.append(el("p", { class: "faint" }, "No run folders were given (--runs)."));
  const select = el("select", { id: "curve-axis", onchange: () => drawCurves() },
    ...Object.entries(curves.axes).map(([name, title]) => el("option", { value: name }, title)));
  const several = curves.lines.some((line) => line.runs > 1);
  body.append(
    el("p", null, el("label", null, "over ", select)),
    el("div", { class: "panels" }, ...curves.panels.map((panel) =>
      el("div", null, el("h3", null, panel.title), el("div", { class: "plot", id: "curve-" + panel.key })))),
    el("div", { class: "legend", id: "curve-legend" }),
    el("p", { class: "faint" }, "Thin: training prompts. Dots: held-out prompts, with 95 % intervals" +
      (several ? "; for several runs of a label their mean, and a band from the lowest to the highest." : ".")),
  );
  const observer = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    drawCurves();
  }, { rootMargin: "300px" });
  observer.observe(body);
}

function drawCurves() {
  const axis = byId("curve-axis").value;
  for (const view of curveViews.splice(0)) view.then((drawn) => drawn.remove());
  for (const panel of data.curves.panels) {
    const lines = data.curves.lines.filter((line) => line.key === panel.key && line.over[axis]);
    const place = byId("curve-" + panel.key);
    place.replaceChildren(...(lines.length ? [] : [el("p", { class: "faint" }, "no values")]));
    if (!lines.length) continue;
    const figure = Bokeh.Plotting.figure({
      height: 240, sizing_mode: "stretch_width", tools: "pan,wheel_zoom,box_zoom,reset,save", x_axis_label: data.curves.axes[axis],
    });
    figure.toolbar.logo = null;
    figure.toolbar.autohide = true;
    for (const line of lines) drawLine(figure, line, line.over[axis]);
    if (panel.key === "cost_mean") {
      figure.add_layout(new Bokeh.Span({ location: 0, dimension: "width", line_color: "#888888", line_dash: "dashed" }));
    }
    themeFigure(figure);
    curveViews.push(Bokeh.Plotting.show(figure, place));
  }
  const labels = [...new Map(data.curves.lines.map((line) => [line.label, line.runs]))];
  byId("curve-legend").replaceChildren(
    ...labels.map(([label, runs]) => el("span", null, dot(colourOf(label)), label + (runs > 1 ? ", " + runs + " runs" : ""))));
}

function drawLine(figure, line, values) {
  const gaps = (list) => Float64Array.from(list, (value) => (value === null ? NaN : value));
  const source = new Bokeh.ColumnDataSource({
    data: { x: gaps(values.x), mean: gaps(values.mean), low: gaps(values.low), high: gaps(values.high), label: values.x.map(() => line.label) },
  });
  const colour = colourOf(line.label);
  const x = { field: "x" };
  const isMain = line.kind === "eval" || line.key === "lambda";
  const drawn = figure.line(x, { field: "mean" }, {
    source, line_color: colour, line_width: isMain ? 2 : 1, line_alpha: isMain ? 1 : 0.45,
  });
  if (line.runs > 1) {
    if (isMain) figure.varea(x, { field: "low" }, { field: "high" }, { source, fill_color: colour, fill_alpha: 0.2 });
  } else if (line.kind === "eval") {
    figure.segment(x, { field: "low" }, x, { field: "high" }, { source, line_color: colour });
  }
  if (line.kind === "eval") {
    figure.scatter(x, { field: "mean" }, { source, size: 6, fill_color: colour, line_color: null });
  }
  figure.add_tools(new Bokeh.HoverTool({
    renderers: [drawn], mode: "vline", visible: false,
    tooltips: [["", "@label" + (line.kind === "eval" ? ", held out" : ", training")], ["", "@mean{0.000}"]],
  }));
}
