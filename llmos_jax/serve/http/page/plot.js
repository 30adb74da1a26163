// Small plots: numbers in, SVG and canvas out. Colours come from the style sheet.

const SVG = "http://www.w3.org/2000/svg";

export function element(name, attributes = {}, text = null) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

function svg(name, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

export function seconds(value) {
  if (value >= 10) return `${value.toFixed(0)} s`;
  if (value >= 1) return `${value.toFixed(1)} s`;
  if (value >= 0.01) return `${(1000 * value).toFixed(0)} ms`;
  return `${(1000 * value).toFixed(1)} ms`;
}

export function short(value) {
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (value >= size) return `${(value / (unit === "k" ? 1e3 : size)).toFixed(1)}${unit}`;
  }
  return Number.isInteger(value) ? String(value) : value.toFixed(1);
}

export function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

function frame(host, height, label, below = 0) {
  const width = Math.max(200, host.clientWidth);
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  return { plot, width, left: 46, right: width - 6, top: 8, foot: height - 6 - below };
}

function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, value)));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

// Lines over the last `span` seconds. series: {class, points: [[time, value], ...]}.
export function lines(host, series, { now, span, label }) {
  const { plot, left, right, top, foot } = frame(host, 132, label, 18);
  const most = ceiling(Math.max(1, ...series.flatMap((one) => one.points.map((point) => point[1]))));
  const x = (time) => right - ((now - time) / span) * (right - left);
  const y = (value) => foot - (value / most) * (foot - top);
  for (const value of most > 1 ? [0, most / 2, most] : [0, most]) {
    plot.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }));
    plot.append(svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  plot.append(svg("text", { x: left, y: foot + 17 }, `${Math.round(span)} s ago`));
  plot.append(svg("text", { x: right, y: foot + 17, "text-anchor": "end" }, "now"));
  for (const { class: name, points } of series) {
    const shown = points.filter(([time]) => now - time <= span);
    const path = shown.map(([time, value]) => `${x(time).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    plot.append(svg("polyline", { class: name, points: path }));
  }
  host.replaceChildren(plot);
}

// One dot a measurement, newest at the right, logarithmic in seconds. points: [[time, seconds], ...].
export function dots(host, points, label) {
  const { plot, left, right, top, foot } = frame(host, 130, label);
  const shown = points.slice(-400);
  if (!shown.length) {
    plot.append(svg("text", { x: (left + right) / 2, y: (top + foot) / 2, "text-anchor": "middle" }, "nothing yet"));
    host.replaceChildren(plot);
    return;
  }
  const logs = shown.map(([, value]) => Math.log10(Math.max(1e-5, value)));
  let low = Math.floor(Math.min(...logs)), high = Math.ceil(Math.max(...logs));
  if (high === low) high = low + 1;
  const y = (log) => foot - ((log - low) / (high - low)) * (foot - top);
  for (let power = low; power <= high; power += 1) {
    plot.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(power), y2: y(power) }));
    plot.append(svg("text", { x: left - 6, y: y(power) + 4, "text-anchor": "end" }, seconds(10 ** power)));
  }
  const step = (right - left - 8) / Math.max(50, shown.length);
  logs.forEach((log, i) => {
    const cx = (right - 4 - (logs.length - 1 - i) * step).toFixed(1);
    plot.append(svg("circle", { class: "dot", cx, cy: y(log).toFixed(1), r: 2.4 }));
  });
  host.replaceChildren(plot);
}

// Cells of a page map, in order of their owners. groups: [{count, class}]; a cell stands for `each` pages of one owner.
export function map(canvas, groups, most = 1024) {
  const total = groups.reduce((sum, group) => sum + group.count, 0);
  const each = Math.max(1, Math.ceil(total / most));
  const cells = groups.flatMap((group) => Array(Math.ceil(group.count / each)).fill(group.class));
  const width = canvas.clientWidth, gap = 2;
  const columns = Math.max(8, Math.min(64, Math.ceil(Math.sqrt(cells.length * 5))));
  const size = Math.min(14, (width + gap) / columns);
  const across = Math.max(1, Math.floor((width + gap) / size));
  const height = Math.max(1, Math.ceil(cells.length / across)) * size;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.height = `${height}px`;
  const paint = canvas.getContext("2d");
  paint.scale(ratio, ratio);
  const colours = new Map();
  cells.forEach((name, i) => {
    if (!colours.has(name)) colours.set(name, colour(name));
    paint.fillStyle = colours.get(name);
    paint.fillRect((i % across) * size, Math.floor(i / across) * size, size - gap, size - gap);
  });
  return each;
}

function colour(name) {
  const probe = element("i", { class: name, hidden: "" });
  document.body.append(probe);
  const found = getComputedStyle(probe).backgroundColor;
  probe.remove();
  return found;
}

// A bar a row: [{name, value, class}].
export function shares(host, rows) {
  const total = rows.reduce((sum, row) => sum + row.value, 0);
  host.replaceChildren(...rows.map(({ name, value, class: style }) => {
    const row = element("div", { class: "share" });
    const bar = svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
    bar.append(svg("rect", { class: style, width: total ? (100 * value) / total : 0, height: 10 }));
    const told = `${short(value)} · ${total ? Math.round((100 * value) / total) : 0} %`;
    row.append(element("span", { title: name }, name), bar, element("span", {}, told));
    return row;
  }));
}
