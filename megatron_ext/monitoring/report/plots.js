// Draws the page's plots from the numbers in it: curves of all runs over each other, and a heat map for each MoE layer.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const palette = ["#3b82c4", "#e07b39", "#2f9e77", "#c45ba0", "#b8860b", "#7a6ff0", "#c0392b", "#2aa5b5"];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const axisLabels = { tokens: "tokens", step: "step", hours: "hours", after: "tokens, one run after the other" };

function element(kind, classes, parent, text) {
  const made = document.createElement(kind);
  made.className = classes;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function short(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return +(value / 1e9).toPrecision(4) + "G";
  if (size >= 1e6) return +(value / 1e6).toPrecision(4) + "M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(4) + "k";
  return size !== 0 && size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(4));
}

// Exponential moving average over about a fiftieth of the curve; what is not a number stays a gap.
function smooth(values) {
  const weight = 1 / Math.max(1, values.length / 50);
  let mean = null;
  return values.map((value) => {
    if (value == null) return null;
    mean = mean === null ? value : mean + weight * (value - mean);
    return mean;
  });
}

// Several curves with x values of their own, as one table: sorted x, and for each curve its values or gaps.
function joined(curves) {
  return uPlot.join(curves.map((curve) => [curve.x, curve.y]));
}

function plot(parent, title, curves, options) {
  const { wide = false, log = false, xLabel = "step", marks = [] } = options;
  const box = element("div", wide ? "plot wide" : "plot", parent);
  element("h3", "", box, title);
  const grid = { stroke: css("--line"), width: 1 };
  const axis = { stroke: css("--quiet"), grid, ticks: grid };
  const drawMarks = (u) => {
    u.ctx.save();
    u.ctx.strokeStyle = css("--quiet");
    u.ctx.setLineDash([4, 4]);
    for (const x of marks) {
      if (x < u.scales.x.min || x > u.scales.x.max) continue;
      const at = u.valToPos(x, "x", true);
      u.ctx.beginPath();
      u.ctx.moveTo(at, u.bbox.top);
      u.ctx.lineTo(at, u.bbox.top + u.bbox.height);
      u.ctx.stroke();
    }
    u.ctx.restore();
  };
  const settings = {
    width: box.clientWidth,
    height: wide ? 360 : 220,
    scales: { x: { time: false }, y: log ? { distr: 3 } : {} },
    cursor: { sync: { key: options.group, setSeries: false }, drag: { x: true, y: false } },
    axes: [
      { ...axis, label: xLabel, labelSize: 20, values: (u, ticks) => ticks.map(short) },
      { ...axis, size: 64, values: (u, ticks) => ticks.map((t) => (t == null ? "" : short(t))) },
    ],
    series: [
      { label: xLabel, value: (u, v) => short(v) },
      ...curves.map((curve) => ({
        label: curve.name,
        stroke: curve.color,
        width: curve.faint ? 0.75 : 1.5,
        alpha: curve.faint ? 0.35 : 1,
        spanGaps: true,
        points: { show: Boolean(curve.points) || curve.x.length === 1, size: 5, fill: curve.color },
        paths: curve.points ? () => null : undefined,
        value: (u, v) => short(v),
      })),
    ],
    hooks: { draw: [drawMarks] },
  };
  const made = new uPlot(settings, joined(curves), box);
  new ResizeObserver(() => made.setSize({ width: box.clientWidth, height: settings.height })).observe(box);
  return made;
}

// The x values of a run's points under the chosen axis; `start` is where the run begins if one comes after the other.
function along(source, axis, start) {
  return axis === "after" ? source.tokens.map((tokens) => tokens + start) : source[axis];
}

function drawCurves(parent) {
  const choices = ["tokens", "step"];
  if (data.phases.every((phase) => phase.hours.every((hour) => hour !== null))) choices.push("hours");
  if (data.phases.length > 1) choices.push("after");
  const state = { axis: "tokens", log: false, smooth: false };
  const controls = element("div", "controls", parent);
  const plots = element("div", "plots", parent);
  const redraw = () => {
    plots.replaceChildren();
    const starts = [];
    data.phases.reduce((sum, phase) => (starts.push(sum), sum + phase.tokens[phase.tokens.length - 1]), 0);
    const marks = data.phases.flatMap((phase, i) =>
      phase.restarts.map((step) => phase.step.findIndex((s) => s >= step)).filter((at) => at >= 0)
        .map((at) => along(phase, state.axis, starts[i])[at]));
    for (const [name, label] of Object.entries(data.curves)) {
      const curves = [];
      data.phases.forEach((phase, i) => {
        const y = phase.curves[name];
        if (!y) return;
        const x = along(phase, state.axis, starts[i]);
        const color = palette[i % palette.length];
        curves.push({ name: phase.name, x, y, color, faint: state.smooth });
        if (state.smooth) curves.push({ name: `${phase.name}, smoothed`, x, y: smooth(y), color });
        if (name === "loss" && phase.validation.step.length) {
          const at = phase.validation.step.map((step) => phase.step.findIndex((s) => s >= step));
          const seen = at.map((index, v) => [index, phase.validation.loss[v]]).filter(([index]) => index >= 0);
          const points = { name: `${phase.name}, validation`, x: seen.map(([index]) => x[index]), y: seen.map(([, v]) => v) };
          curves.push({ ...points, color, points: true });
        }
      });
      if (!curves.length) continue;
      const wide = name === "loss";
      const log = state.log && wide;
      plot(plots, label, curves, { wide, log, xLabel: axisLabels[state.axis], marks, group: "curves" });
    }
  };
  for (const choice of choices) {
    const label = element("label", "", controls);
    const input = element("input", "", label);
    Object.assign(input, { type: "radio", name: "axis", checked: choice === state.axis });
    label.append(` ${axisLabels[choice]}`);
    input.addEventListener("change", () => { state.axis = choice; redraw(); });
  }
  for (const [key, text] of [["log", "logarithmic loss"], ["smooth", "smoothed"]]) {
    const label = element("label", "", controls);
    const input = element("input", "", label);
    input.type = "checkbox";
    label.append(` ${text}`);
    input.addEventListener("change", () => { state[key] = input.checked; redraw(); });
  }
  element("span", "", controls, "drag to zoom, double click to see all; a dashed line: the run was continued");
  redraw();
  return redraw;
}

function mix(from, to, share) {
  return from.map((channel, i) => channel + (to[i] - channel) * share);
}

// Steps across, experts down; the colour says how busy an expert was against an even share, from none to twice as much.
function heatMap(parent, layer, columns, steps) {
  const box = element("div", "heat", parent);
  element("h3", "", box, `layer ${layer}: load of each expert`);
  const canvas = element("canvas", "", box);
  canvas.width = columns.length;
  canvas.height = columns[0].length;
  const [cold, even, hot] = ["--cold", "--even", "--hot"].map((name) => css(name).split(",").map(Number));
  const context = canvas.getContext("2d");
  const picture = context.createImageData(canvas.width, canvas.height);
  columns.forEach((column, x) => column.forEach((load, y) => {
    const color = load < 1 ? mix(cold, even, load) : mix(even, hot, Math.min(load - 1, 1));
    picture.data.set([...color, 255], 4 * (y * canvas.width + x));
  }));
  context.putImageData(picture, 0, 0);
  const caption = element("p", "", box);
  const hint = `steps ${steps[0]} to ${steps[steps.length - 1]}; blue: idle, red: twice an even share or more`;
  caption.textContent = hint;
  canvas.addEventListener("mousemove", (event) => {
    const x = Math.min(columns.length - 1, Math.floor((event.offsetX / canvas.clientWidth) * columns.length));
    const y = Math.min(columns[0].length - 1, Math.floor((event.offsetY / canvas.clientHeight) * columns[0].length));
    caption.textContent = `step ${steps[x]}, expert ${y}: ${columns[x][y].toFixed(2)} of an even share`;
  });
  canvas.addEventListener("mouseleave", () => { caption.textContent = hint; });
}

function drawExperts(parent) {
  const experts = data.phases[Number(parent.dataset.phase)].experts;
  parent.replaceChildren();
  const maps = element("div", "plots", parent);
  for (const layer of experts.layers) heatMap(maps, layer, experts.load[layer], experts.load_steps);
  const plots = element("div", "plots", parent);
  for (const [name, label] of Object.entries(data.health)) {
    if (!experts.health[name]) continue;
    const curves = experts.health[name].map((y, i) => {
      // From the first layer to the last around half of the colour circle.
      const hue = 260 - (220 * i) / Math.max(1, experts.layers.length - 1);
      return { name: `layer ${experts.layers[i]}`, x: experts.step, y, color: `hsl(${hue}, 55%, 52%)` };
    });
    plot(plots, label, curves, { group: `experts ${parent.dataset.phase}` });
  }
}

// Of each source its loss in training and validation, and how much of it was read; a dashed line where a stage begins.
function drawSources(parent) {
  const sources = data.phases[Number(parent.dataset.phase)].sources;
  parent.replaceChildren();
  const plots = element("div", "plots", parent);
  const names = [...new Set([...Object.keys(sources.loss), ...Object.keys(sources.validation)])];
  const color = (name) => {
    const at = names.indexOf(name);
    return names.length <= palette.length ? palette[at] : `hsl(${(360 * at) / names.length}, 55%, 52%)`;
  };
  const draw = (title, steps, bySource) => {
    const curves = Object.entries(bySource).filter(([, y]) => y.some((value) => value !== null))
      .map(([name, y]) => ({ name, x: steps, y, color: color(name) }));
    if (curves.length) plot(plots, title, curves, { marks: sources.stages, group: `sources ${parent.dataset.phase}` });
  };
  draw("training loss of each source", sources.step, sources.loss);
  draw("validation loss of each source", sources.validation_step, sources.validation);
  draw("epochs read of each source", sources.step, sources.epochs);
}

const redrawCurves = drawCurves(document.getElementById("curves"));
const expertSections = [...document.querySelectorAll(".experts")];
expertSections.forEach(drawExperts);
const sourceSections = [...document.querySelectorAll(".sources")];
sourceSections.forEach(drawSources);
// Colours come from the style sheet, which follows the reader's light or dark mode.
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  redrawCurves();
  expertSections.forEach(drawExperts);
  sourceSections.forEach(drawSources);
});
document.documentElement.dataset.drawn = String(document.querySelectorAll("canvas").length);
