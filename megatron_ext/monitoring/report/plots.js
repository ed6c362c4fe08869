// What every section of the page draws with: curves over a common axis, areas, heat maps. uPlot does the drawing.
"use strict";

let data = JSON.parse(document.getElementById("data").textContent);
const palette = ["#3b82c4", "#e07b39", "#2f9e77", "#c45ba0", "#b8860b", "#7a6ff0", "#c0392b", "#2aa5b5"];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// What the reader has chosen, for all sections; and to where each plot is zoomed.
const state = { axis: "tokens", log: false, smooth: false, events: true };
const zooms = new Map();

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

// A curve as it is; where the reader asked for it, faint, and its mean over it.
function smoothed(curve) {
  if (!state.smooth) return [curve];
  return [{ ...curve, faint: true }, { ...curve, name: `${curve.name}, smoothed`, y: smooth(curve.y) }];
}

function colorOf(names, name) {
  const at = names.indexOf(name);
  return names.length <= palette.length ? palette[at] : `hsl(${(360 * at) / names.length}, 55%, 52%)`;
}

const markColors = { error: "--bad", warning: "--warn", info: "--quiet" };

// Vertical lines at marks: {x, text, severity}; those without a text (a restart, a stage) are dashed.
function drawMarks(u, marks) {
  u.ctx.save();
  for (const { x, text, severity } of marks) {
    if (x < u.scales.x.min || x > u.scales.x.max) continue;
    const at = u.valToPos(x, "x", true);
    u.ctx.strokeStyle = u.ctx.fillStyle = css(markColors[severity] || "--quiet");
    u.ctx.setLineDash(text ? [] : [4, 4]);
    u.ctx.globalAlpha = text ? 0.6 : 1;
    u.ctx.beginPath();
    u.ctx.moveTo(at, u.bbox.top);
    u.ctx.lineTo(at, u.bbox.top + u.bbox.height);
    u.ctx.stroke();
    if (!text) continue;
    const size = 5 * devicePixelRatio;
    u.ctx.globalAlpha = 1;
    u.ctx.beginPath();
    u.ctx.moveTo(at - size, u.bbox.top);
    u.ctx.lineTo(at + size, u.bbox.top);
    u.ctx.lineTo(at, u.bbox.top + 1.5 * size);
    u.ctx.fill();
  }
  u.ctx.restore();
}

// What is marked near the cursor, in words.
function nearMarks(u, marks) {
  if (u.cursor.left == null || u.cursor.left < 0) return "";
  const near = marks.filter(({ x, text }) => text && Math.abs(u.valToPos(x, "x") - u.cursor.left) < 8);
  const shown = near.slice(0, 3).map(({ text }) => text).join(" · ");
  return near.length > 3 ? `${shown} · and ${near.length - 3} more` : shown;
}

function plot(parent, title, curves, options) {
  const { wide = false, log = false, xLabel = "step", marks = [], stacked = false } = options;
  const box = element("div", wide ? "plot wide" : "plot", parent);
  element("h3", "", box, title);
  const grid = { stroke: css("--line"), width: 1 };
  const axis = { stroke: css("--quiet"), grid, ticks: grid };
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
        fill: stacked ? curve.color : undefined,
        width: curve.faint ? 0.75 : 1.5,
        alpha: curve.faint ? 0.35 : 1,
        spanGaps: true,
        points: { show: Boolean(curve.points) || curve.x.length === 1, size: 5, fill: curve.color },
        paths: curve.points ? () => null : undefined,
        value: (u, v, series, at) => short(curve.own && at != null ? curve.own[at] : v),
      })),
    ],
    hooks: { draw: [(u) => drawMarks(u, marks)] },
  };
  const made = new uPlot(settings, uPlot.join(curves.map((curve) => [curve.x, curve.y])), box);
  if (marks.some(({ text }) => text)) {
    const note = element("p", "note", box, "");
    made.hooks.setCursor = [(u) => { note.textContent = nearMarks(u, marks); }];
  }
  keepZoom(made, `${options.group} ${title}`);
  new ResizeObserver(() => made.setSize({ width: box.clientWidth, height: settings.height })).observe(box);
  return made;
}

// A plot that is drawn again, with what is new, is zoomed as the one before it was.
function keepZoom(made, key) {
  if (zooms.has(key)) made.setScale("x", zooms.get(key));
  made.hooks.setScale = [(u, scale) => {
    if (scale !== "x") return;
    const { min, max } = u.scales.x, xs = u.data[0];
    if (min > xs[0] || max < xs[xs.length - 1]) zooms.set(key, { min, max });
    else zooms.delete(key);
  }];
}

function mix(from, to, share) {
  return from.map((channel, i) => channel + (to[i] - channel) * share);
}

// Steps across, experts down; the colour says how busy an expert was against an even share, from none to twice as much.
function heatMap(parent, layer, experts) {
  const rows = experts.num_experts[layer], steps = experts.load_steps, bytes = atob(experts.load[layer]);
  const load = (x, y) => bytes.charCodeAt(x * rows + y) / data.load_unit;
  const box = element("div", "heat", parent);
  element("h3", "", box, `layer ${layer}: load of each expert`);
  const canvas = element("canvas", "", box);
  canvas.width = steps.length;
  canvas.height = rows;
  const [cold, even, hot] = ["--cold", "--even", "--hot"].map((name) => css(name).split(",").map(Number));
  const context = canvas.getContext("2d");
  const picture = context.createImageData(canvas.width, canvas.height);
  for (let x = 0; x < steps.length; x++) {
    for (let y = 0; y < rows; y++) {
      const at = load(x, y);
      const color = at < 1 ? mix(cold, even, at) : mix(even, hot, Math.min(at - 1, 1));
      picture.data.set([...color, 255], 4 * (y * canvas.width + x));
    }
  }
  context.putImageData(picture, 0, 0);
  const caption = element("p", "", box);
  const hint = `steps ${steps[0]} to ${steps[steps.length - 1]}; blue: idle, red: twice an even share or more`;
  caption.textContent = hint;
  canvas.addEventListener("pointermove", (event) => {
    const x = Math.min(steps.length - 1, Math.floor((event.offsetX / canvas.clientWidth) * steps.length));
    const y = Math.min(rows - 1, Math.floor((event.offsetY / canvas.clientHeight) * rows));
    const most = load(x, y) * data.load_unit === 255 ? " or more" : "";
    caption.textContent = `step ${steps[x]}, expert ${y}: ${load(x, y).toFixed(2)}${most} of an even share`;
  });
  canvas.addEventListener("pointerleave", () => { caption.textContent = hint; });
}
