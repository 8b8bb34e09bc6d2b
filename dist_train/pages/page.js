"use strict";
// Draws the charts of a page, sorts its tables, and switches between light and dark.

const root = document.documentElement;
const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

function numbers(text, Type) {
  return new Type(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
}

// 12345.678 as 12,346, and 0.00012345 as 0.0001235
function shown(value) {
  const size = Math.abs(value);
  if (size >= 1e15 || (size && size < 1e-4)) return value.toExponential(3);
  return value.toLocaleString("en-US", size >= 1000 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 4 });
}

function short(value) {
  if (Math.abs(value) >= 1e6) return `${+(value / 1e6).toFixed(2)}M`;
  if (Math.abs(value) >= 1e4) return `${+(value / 1e3).toFixed(1)}k`;
  return +value.toPrecision(6) + "";
}

function clock(seconds) {
  const hours = Math.floor(seconds / 3600), minutes = Math.floor(seconds / 60) % 60, rest = +(seconds % 60).toFixed(1);
  if (hours) return `${hours}h${minutes ? String(minutes).padStart(2, "0") + "m" : ""}`;
  return minutes ? `${minutes}m${rest ? String(Math.round(rest)).padStart(2, "0") + "s" : ""}` : `${rest}s`;
}

// The exponential moving average, divided by the weights that it has seen: early points are not pulled to 0.
function smoothed(values, weight) {
  let sum = 0, seen = 0;
  return values.map((value) => {
    if (value == null) return value;
    sum = weight * sum + (1 - weight) * value;
    seen = weight * seen + (1 - weight);
    return sum / seen;
  });
}

function nearest(values, index) {
  for (let by = 0; by < values.length; by++) {
    if (values[index - by] != null) return index - by;
    if (values[index + by] != null) return index + by;
  }
  return null;
}

const SECONDS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 432000];
const charts = [];

function chart(figure) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const names = [...new Set(spec.curves.map((curve) => curve.name))];
  const xs = spec.x.map((text) => Array.from(numbers(text, Float64Array)));
  const curves = spec.curves.map((curve) => {
    const y = Array.from(numbers(curve.y, Float32Array), (value) => (Number.isFinite(value) ? value : null));
    const number = names.indexOf(curve.name);
    return { ...curve, y, ink: `--c${number % 10}`, dash: Math.floor(number / 10) % 3 };
  });
  curves.sort((a, b) => a.x - b.x); // the order in which uPlot joins tables
  const x = spec.x_label === "time" ? clock : shown;
  const hidden = new Set();
  const state = { smooth: spec.smooth, log: false, view: null, u: null };
  const place = element("div"), legend = element("div", { className: "legend" }), tip = element("div", { className: "tip" });
  figure.append(place, legend, tip);

  const swatch = (curve) => {
    const mark = element("i", { className: `dash${curve.dash}` });
    mark.style.setProperty("--color", `var(${curve.ink})`);
    return mark;
  };

  function controls() {
    const weight = element("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: state.smooth });
    const told = element("output", {}, String(state.smooth));
    weight.oninput = () => { state.smooth = +weight.value; told.textContent = weight.value; draw(); };
    const box = element("div", { className: "controls" });
    if (curves.some((curve) => curve.y.length > 20)) box.append(element("label", {}, "smooth", weight, told));
    if (curves.every((curve) => curve.y.every((value) => value == null || value > 0))) {
      const log = element("input", { type: "checkbox" });
      log.onchange = () => { state.log = log.checked; draw(); };
      box.append(element("label", {}, log, "log scale"));
    }
    figure.querySelector("figcaption").append(box);
  }

  function entries() {
    for (const name of names) {
      const own = curves.filter((curve) => curve.name === name);
      const button = element("button", { title: "click: hide or show; double click: only this" }, swatch(own[0]), name);
      button.setAttribute("aria-pressed", "true");
      button.onclick = () => { hidden.has(name) ? hidden.delete(name) : hidden.add(name); apply(); };
      button.ondblclick = () => {
        const alone = hidden.size === names.length - 1 && !hidden.has(name);
        hidden.clear();
        if (!alone) names.filter((other) => other !== name).forEach((other) => hidden.add(other));
        apply();
      };
      legend.append(button);
    }
  }

  function apply() {
    [...legend.children].forEach((button, i) => button.setAttribute("aria-pressed", String(!hidden.has(names[i]))));
    state.u.batch(() => state.u.series.forEach((line, i) => i && state.u.setSeries(i, { show: !hidden.has(line.curve.name) })));
  }

  // One line for each curve; where it is smoothed, a faint one of what was measured besides.
  function lines() {
    return curves.flatMap((curve) => {
      const line = (faint) => ({
        curve, faint, label: curve.name, show: !hidden.has(curve.name), width: faint ? 1 : 1.75, dash: [[], [7, 4], [2, 3]][curve.dash],
        stroke: () => color(curve.ink) + (faint ? "40" : ""),
        points: { show: !faint && curve.y.length <= 40, size: 5, fill: () => color(curve.ink) },
      });
      return state.smooth ? [line(true), line(false)] : [line(false)];
    });
  }

  function data() {
    const tables = xs.map((values) => [values]);
    for (const curve of curves) {
      tables[curve.x].push(curve.y);
      if (state.smooth) tables[curve.x].push(smoothed(curve.y, state.smooth));
    }
    return tables.length > 1 ? uPlot.join(tables) : tables[0] || [[]];
  }

  function markers(u) {
    const { ctx, bbox } = u, ratio = uPlot.pxRatio;
    ctx.save();
    ctx.font = `${11 * ratio}px system-ui, sans-serif`;
    ctx.strokeStyle = ctx.fillStyle = color("--muted");
    ctx.textAlign = "left";
    ctx.lineWidth = ratio;
    ctx.setLineDash([4 * ratio, 4 * ratio]);
    let free = -Infinity; // where the last text ends
    for (const marker of spec.markers) {
      const left = u.valToPos(marker.x, "x", true);
      if (left < bbox.left || left > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(left, bbox.top);
      ctx.lineTo(left, bbox.top + bbox.height);
      ctx.stroke();
      if (left < free) continue;
      ctx.fillText(marker.text, left + 4 * ratio, bbox.top + 12 * ratio);
      free = left + 12 * ratio + ctx.measureText(marker.text).width;
    }
    ctx.restore();
  }

  function hover(u) {
    const { left, top, idx } = u.cursor;
    const found = [];
    u.series.forEach((line, i) => {
      if (!i || line.faint || !line.show) return;
      const at = u.cursor.idxs[i];
      if (at != null) found.push({ line, i, value: u.data[i][at], away: Math.abs(u.valToPos(u.data[i][at], "y") - top) });
    });
    tip.style.display = left >= 0 && found.length ? "block" : "none";
    if (left < 0 || !found.length) return;
    const near = found.reduce((a, b) => (b.away < a.away ? b : a)), most = 12;
    found.sort((a, b) => b.value - a.value);
    const from = Math.max(0, Math.min(found.indexOf(near) - most / 2, found.length - most));
    const rows = found.slice(from, from + most).map(({ line, value }) => element(
      "div", { className: line === near.line && found.length > 1 ? "near" : "" }, swatch(line.curve),
      element("span", {}, [line.curve.name, line.curve.part].filter(Boolean).join(" · ")), shown(value)));
    const rest = found.length - rows.length;
    tip.replaceChildren(element("b", {}, `${spec.x_label} ${x(u.data[0][idx])}`), ...rows, ...(rest ? [`and ${rest} more`] : []));
    const box = place.getBoundingClientRect(), over = u.over.getBoundingClientRect(), frame = figure.getBoundingClientRect();
    const at = over.left - frame.left + left, turned = at > box.width / 2;
    tip.style.left = turned ? "auto" : `${at + 16}px`;
    tip.style.right = turned ? `${frame.width - at + 16}px` : "auto";
    tip.style.top = `${over.top - frame.top + Math.min(top + 12, Math.max(over.height - tip.offsetHeight, 0))}px`;
  }

  const size = () => ({ width: place.clientWidth, height: innerWidth < 640 ? 240 : 340 });

  function draw() {
    const axis = (label, values) => ({
      label, labelSize: 20, labelGap: 0, labelFont: "12px system-ui, sans-serif", font: "12px system-ui, sans-serif",
      stroke: () => color("--muted"), grid: { stroke: () => color("--line"), width: 1 }, ticks: { show: false },
      values: (u, splits) => splits.map((value) => (value == null ? "" : values(value))),
    });
    const view = state.u && state.view;
    if (state.u) state.u.destroy();
    state.u = new uPlot({
      ...size(), legend: { show: false }, focus: { alpha: 0.3 },
      scales: { x: { time: false }, y: { distr: state.log ? 3 : 1 } },
      axes: [
        { ...axis(spec.x_label, spec.x_label === "time" ? clock : short), size: 30, space: 80, ...(spec.x_label === "time" && { incrs: SECONDS }) },
        { ...axis(spec.y_label, short), size: 52 },
      ],
      series: [{}, ...lines()],
      cursor: {
        focus: {
          prox: curves.length > 1 ? 24 : -1,
          dist: (u, i, at, here, cursor) => (u.series[i].faint ? Infinity : Math.abs(here - cursor)),
        }, y: false, drag: { x: true, y: false },
        dataIdx: (u, i, index) => {
          const at = i ? nearest(u.data[i], index) : index;
          const away = at == null ? Infinity : Math.abs(u.valToPos(u.data[0][at], "x") - u.valToPos(u.data[0][index], "x"));
          return away < 40 ? at : null;
        },
        points: { size: 7 },
      },
      hooks: {
        draw: [markers], setCursor: [hover],
        setScale: [(u, key) => { if (key === "x") state.view = [u.scales.x.min, u.scales.x.max]; }],
      },
    }, data(), place);
    if (view) state.u.setScale("x", { min: view[0], max: view[1] });
  }

  controls();
  entries();
  draw();
  new ResizeObserver(() => state.u.setSize(size())).observe(place);
  charts.push(state);
}

function sortable(table) {
  const heads = [...table.querySelectorAll("th")], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const cells = [...body.rows].map((row) => row.cells[column]).filter(Boolean);
    if (cells.some((cell) => cell.className === "number")) [head, ...cells].forEach((cell) => (cell.className = "number"));
    head.onclick = () => {
      const up = head.getAttribute("aria-sort") === "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (a, b) => value(a).localeCompare(value(b), undefined, { numeric: true });
      const both = (a, b) => (isNaN(value(a)) || isNaN(value(b)) ? order(a, b) : value(a) - value(b));
      body.append(...[...body.rows].sort((a, b) => (up ? both(a, b) : both(b, a))));
    };
  });
}

const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const recolor = () => charts.forEach((state) => state.u.redraw(false));
document.getElementById("theme").onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; recolor(); };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolor);
document.querySelectorAll("section > h2").forEach((heading, i) => {
  heading.id = `part-${i}`;
  document.querySelector("nav").append(element("a", { href: `#part-${i}` }, heading.textContent));
});
document.querySelectorAll(".chart").forEach(chart);
document.querySelectorAll(".wide table").forEach(sortable);
