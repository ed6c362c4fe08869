// Draws the sections of the page, again when the reader chooses something else, and, live, when there is something new.
const axisLabels = { tokens: "tokens", step: "step", hours: "hours", after: "tokens, one run after the other" };

// The x values of a run's points under the chosen axis; `start` is where the run begins if one comes after the other.
function along(source, axis, start) {
  return axis === "after" ? source.tokens.map((tokens) => tokens + start) : source[axis];
}

// What happened in a run, at the points of its curves: restarts, and, if the reader wants them, events.
function marksOf(phase, x, many) {
  const at = (step) => {
    const found = phase.step.findIndex((s) => s >= step);
    return x[found < 0 ? x.length - 1 : found];
  };
  const marks = phase.restarts.map((step) => ({ x: at(step) }));
  if (!state.events) return marks;
  const { step, kind, severity, text } = phase.events, run = many ? `${phase.name}, ` : "";
  return marks.concat(step.map((s, i) =>
    ({ x: at(s), severity: severity[i], text: `${run}step ${s}, ${kind[i].replaceAll("_", " ")}: ${text[i]}` })));
}

function curvesOf(name, xs) {
  return data.phases.flatMap((phase, i) => {
    const y = phase.curves[name];
    if (!y) return [];
    const x = xs[i], color = palette[i % palette.length];
    const curves = smoothed({ name: phase.name, x, y, color });
    if (name === "loss" && phase.validation.step.length) {
      const at = phase.validation.step.map((step) => phase.step.findIndex((s) => s >= step));
      const seen = at.map((index, v) => [index, phase.validation.loss[v]]).filter(([index]) => index >= 0);
      const points = { x: seen.map(([index]) => x[index]), y: seen.map(([, v]) => v), points: true };
      curves.push({ name: `${phase.name}, validation`, color, ...points });
    }
    return curves;
  });
}

function drawCurves(plots) {
  plots.replaceChildren();
  const starts = [];
  data.phases.reduce((sum, phase) => (starts.push(sum), sum + phase.tokens[phase.tokens.length - 1]), 0);
  const xs = data.phases.map((phase, i) => along(phase, state.axis, starts[i]));
  const marks = data.phases.flatMap((phase, i) => marksOf(phase, xs[i], data.phases.length > 1));
  for (const [name, label] of Object.entries(data.curves)) {
    const curves = curvesOf(name, xs), wide = name === "loss";
    const shown = wide || name === "grad_norm" ? marks : marks.filter(({ text }) => !text);
    const options = { wide, log: state.log && wide, xLabel: axisLabels[state.axis], marks: shown, group: "curves" };
    if (curves.length) plot(plots, label, curves, options);
  }
}

function drawExperts(parent) {
  const experts = data.phases[Number(parent.dataset.phase)].experts;
  parent.replaceChildren();
  const maps = element("div", "plots", parent);
  for (const layer of experts.layers) heatMap(maps, layer, experts);
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
  const marks = sources.stages.map((x) => ({ x }));
  const draw = (title, steps, bySource, change = (curve) => [curve]) => {
    const curves = Object.entries(bySource).filter(([, y]) => y.some((value) => value !== null))
      .flatMap(([name, y]) => change({ name, x: steps, y, color: colorOf(names, name) }));
    if (curves.length) plot(plots, title, curves, { marks, group: `sources ${parent.dataset.phase}` });
  };
  draw("training loss of each source", sources.step, sources.loss, smoothed);
  draw("validation loss of each source", sources.validation_step, sources.validation);
  draw("epochs read of each source", sources.step, sources.epochs);
}

// Of each source that several runs have its loss in all of them.
function drawCompared(parent) {
  parent.replaceChildren();
  const plots = element("div", "plots", parent);
  const runs = data.phases.map((phase, i) => ({ ...phase, color: palette[i % palette.length] })).filter((p) => p.sources);
  const names = new Set(runs.flatMap((run) => Object.keys(run.sources.loss)));
  for (const name of names) {
    const having = runs.filter((run) => run.sources.loss[name]);
    if (having.length < 2) continue;
    const curves = having.flatMap((run) =>
      smoothed({ name: run.name, x: run.sources.step, y: run.sources.loss[name], color: run.color }));
    plot(plots, `training loss of ${name}`, curves, { group: "compared" });
  }
}

// The parts of a step over each other, so that their top is the whole.
function drawTimes(parent) {
  const phase = data.phases[Number(parent.dataset.phase)], parts = Object.keys(phase.seconds);
  parent.replaceChildren();
  const plots = element("div", "plots", parent);
  let sum = phase.step.map(() => 0);
  const curves = parts.map((name) => {
    const own = phase.seconds[name];
    sum = sum.map((value, i) => value + (own[i] ?? 0));
    return { name: name.replaceAll("_", " + "), x: phase.step, y: sum, own, color: colorOf(parts, name) };
  });
  // The highest first: what is under it is drawn over it.
  plot(plots, "seconds of a step, by part", curves.reverse(), { wide: true, stacked: true, group: parent.dataset.phase });
}

// Of each metric of several checkpoints a curve over steps, with the ends of its interval where it has one.
function drawEvaluated(parent) {
  const found = data.phases[Number(parent.dataset.phase)].evaluated;
  parent.replaceChildren();
  if (!found) return;
  const plots = element("div", "plots", parent), color = palette[0];
  for (const [name, { value, half }] of Object.entries(found.metrics)) {
    const end = (sign) => value.map((v, i) => (v === null || half[i] === null ? null : v + sign * half[i]));
    const bounds = half ? [["+ interval", 1], ["- interval", -1]] : [];
    const curves = [
      { name, x: found.step, y: value, color },
      ...bounds.map(([text, sign]) => ({ name: text, x: found.step, y: end(sign), color, faint: true })),
    ];
    plot(plots, name, curves, { group: `evaluated ${parent.dataset.phase}` });
  }
}

const drawing = { experts: drawExperts, sources: drawSources, times: drawTimes, evaluated: drawEvaluated };

function controls(parent, redraw) {
  const choices = ["tokens", "step"];
  if (data.phases.every((phase) => phase.hours.every((hour) => hour !== null))) choices.push("hours");
  if (data.phases.length > 1) choices.push("after");
  const box = element("div", "controls", parent);
  const input = (type, text, checked, change) => {
    const label = element("label", "", box), made = element("input", "", label);
    Object.assign(made, { type, name: type === "radio" ? "axis" : "", checked });
    label.append(` ${text}`);
    made.addEventListener("change", () => { change(made.checked); redraw(); });
  };
  for (const choice of choices) {
    input("radio", axisLabels[choice], choice === state.axis, () => { state.axis = choice; zooms.clear(); });
  }
  const options = { log: "logarithmic loss", smooth: "smoothed", events: "events" };
  for (const [key, text] of Object.entries(options)) {
    input("checkbox", text, state[key], (checked) => { state[key] = checked; });
  }
  element("span", "", box, "drag to zoom, double click to see all; a dashed line: the run was continued");
}

function drawAll() {
  if (!data.phases.length) return;
  drawCurves(document.querySelector("#curves > .plots"));
  const compared = document.getElementById("compared");
  if (compared) drawCompared(compared);
  for (const [kind, draw] of Object.entries(drawing)) document.querySelectorAll(`.${kind}`).forEach(draw);
  document.documentElement.dataset.drawn = String(document.querySelectorAll("canvas").length);
}

// Ask for what is new every few seconds; where there are other sections than before, the whole page anew.
function follow(number, sections) {
  const status = element("p", "live", document.querySelector("h1").parentElement);
  document.querySelector("h1").after(status);
  const ask = async () => {
    try {
      const answer = await fetch(`/news?seen=${number}`, { cache: "no-store" });
      if (answer.status === 200) {
        const news = await answer.json();
        if (JSON.stringify(news.sections) !== sections) {
          location.reload();
          return;
        }
        number = news.number;
        data = news.data;
        for (const [id, html] of Object.entries(news.tables)) document.getElementById(id).outerHTML = html;
        drawAll();
      }
      status.textContent = answer.ok ? `live; looked at ${new Date().toLocaleTimeString()}` : await answer.text();
    } catch {
      status.textContent = "whoever served this page does not answer any more";
    }
    setTimeout(ask, 5000);
  };
  ask();
}

const curves = document.getElementById("curves");
if (data.phases.length) controls(curves, drawAll);
else element("p", "", curves, "no training step has been reported yet");
element("div", "plots", curves);
drawAll();
// Colours come from the style sheet, which follows the reader's light or dark mode.
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
if (document.body.dataset.live) follow(Number(document.body.dataset.live), JSON.stringify(data.sections));
