// Draws the figures of figures.py as SVG: lines, dots, bars, lanes and maps; reads them out on hover and arrow keys.
"use strict";
const SVG = "http://www.w3.org/2000/svg";
const VIRIDIS = [[68, 1, 84], [70, 50, 126], [54, 92, 141], [39, 127, 142], [31, 161, 135], [74, 193, 109], [160, 218, 57], [253, 231, 37]];
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "12 4", "4 4"];
const LETTER = 6.7; // pixels, about, of a letter on an axis

function node(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

function html(name, className, parent, text) {
  const made = document.createElement(name);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e12)) return value.toExponential(2).replace("-", "−");
  return new Intl.NumberFormat("en", {maximumSignificantDigits: size >= 1e4 ? 6 : 4}).format(value).replace("-", "−");
}

const scaled = (axis, value) => axis.log ? Math.log10(value) : value;
function placer(axis, from, to) {
  const [low, high] = axis.range.map((value) => scaled(axis, value));
  return (value) => from + (scaled(axis, value) - low) / (high - low) * (to - from);
}

function viridis(part) {
  const at = Math.min(Math.max(part, 0), 1) * (VIRIDIS.length - 1), low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[low].map((value, i) => Math.round(value + (VIRIDIS[low + 1][i] - value) * (at - low)));
}

// What the page's controls leave of a mark: all, some rows, or nothing.
function chosen(mark) {
  if (!Object.entries(mark.when || {}).every(([key, value]) => state[key] === value)) return null;
  if (mark.kind !== "cells" || !mark.tags || state.rows === "all") return mark;
  const kept = mark.rows.map((_, i) => i).filter((i) => mark.tags[i].includes(state.rows));
  const found = {...mark};
  for (const key of ["rows", "values", "texts", "notes", "rownotes", "ticks"]) {
    if (mark[key]) found[key] = kept.map((i) => mark[key][i]);
  }
  return found;
}

function draw(div) {
  const figure = figures[div.dataset.chart], label = div.getAttribute("aria-label");
  const panels = figure.panels.map((panel) => ({...panel, y: panel.by ? panel.by[state[panel.key]] : panel.y, marks: panel.marks.map(chosen).filter(Boolean)}));
  const width = Math.max(div.clientWidth, 260);
  div.replaceChildren();
  legend(div, panels);
  if (figure.colors) scale(div, figure.colors);
  for (const panel of panels) {
    panel.map = panel.marks.find((mark) => mark.kind === "cells");
    if (!panel.map) continue;
    const count = Math.max(panel.map.rows.length, 1);
    panel.height = count * (count <= 40 ? Math.max(panel.row, Math.min(24, 420 / count)) : panel.row);
  }
  const names = panels.flatMap((panel) => panel.map ? panel.map.ticks || panel.map.rows : panel.y.ticks.map(([, text]) => text));
  const left = Math.max(...names.map((name) => name.length), 1) * LETTER + (panels.some((panel) => panel.y.title) ? 30 : 12);
  const below = (figure.x.slant ? 100 : 20) + 22;
  let top = 8;
  for (const panel of panels) {
    if (panel.title) top += 20;
    panel.top = top;
    top += panel.height + 12;
  }
  const height = top - 12 + below;
  const svg = node("svg", {viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true"}, div);
  const x = placer(figure.x, left, width - 10), last = panels[panels.length - 1];
  for (const panel of panels) {
    const bottom = panel.top + panel.height;
    if (panel.title) node("text", {x: left, y: panel.top - 6, class: "title"}, svg, panel.title);
    const rows = panel.map ? {range: [-0.5, panel.map.rows.length - 0.5]} : panel.y;
    const y = panel.map || rows.range[0] > rows.range[1] ? placer({range: rows.range.slice().sort((a, b) => a - b)}, panel.top, bottom) : placer(rows, bottom, panel.top);
    Object.assign(panel, {left, right: width - 10, bottom, px: x, py: y, points: []});
    const ticks = panel.map ? (panel.map.ticks || panel.map.rows).map((text, i) => [i, text]) : panel.y.ticks;
    let free = Infinity;
    for (const [value, text] of panel.map ? ticks : ticks.slice().sort((a, b) => a[0] - b[0])) {
      const at = y(value);
      if (Math.abs(free - at) < 12 && free !== Infinity) continue;
      free = at;
      if (!panel.map) node("line", {x1: left, x2: width - 10, y1: at, y2: at, class: "grid"}, svg);
      node("text", {x: left - 6, y: at + 4, class: "tick end"}, svg, text);
    }
    if (panel.y.title) {
      const middle = (panel.top + bottom) / 2;
      node("text", {x: 12, y: middle, class: "tick mid", transform: `rotate(-90 12 ${middle})`}, svg, panel.y.title);
    }
    const order = panel.marks.filter((mark) => mark.kind !== "rule").concat(panel.marks.filter((mark) => mark.kind === "rule"));
    for (const mark of order) MARKS[mark.kind](svg, panel, mark);
  }
  bottomAxis(svg, last.map?.x ? {...figure.x, ticks: last.map.x} : figure.x, last, width);
  div.view = {svg, panels, figure, cursor: node("rect", {class: "cursor", width: 0, height: 0, rx: 3}, svg)};
  div.setAttribute("role", "application");
  div.setAttribute("aria-roledescription", "chart");
  div.setAttribute("aria-label", label);
  div.tabIndex = 0;
}

function bottomAxis(svg, axis, panel, width) {
  let free = -Infinity;
  for (const [value, text] of axis.ticks) {
    const at = panel.px(value), wide = axis.slant ? 13 : text.length * LETTER + 8;
    if (at - wide / 2 < free || at > width || at < panel.left - 1) continue;
    free = at + wide / 2;
    if (axis.slant) node("text", {x: at + 4, y: panel.bottom + 8, class: "tick end", transform: `rotate(-90 ${at + 4} ${panel.bottom + 8})`}, svg, text);
    else node("text", {x: at, y: panel.bottom + 17, class: "tick mid"}, svg, text);
  }
  const below = panel.bottom + (axis.slant ? 112 : 36);
  node("text", {x: (panel.left + panel.right) / 2, y: below, class: "tick mid"}, svg, axis.title);
}

function legend(div, panels) {
  const box = html("div", "legend", div), seen = new Set();
  for (const mark of panels.flatMap((panel) => panel.marks)) {
    if (!["line", "dots", "bars"].includes(mark.kind) || seen.has(mark.name)) continue;
    seen.add(mark.name);
    const item = html("span", "", box), svg = node("svg", {width: 26, height: 12, viewBox: "0 0 26 12", "aria-hidden": "true"}, item);
    if (mark.kind === "line") {
      node("line", {x1: 0, x2: 26, y1: 6, y2: 6, class: `line s${mark.style}`, "stroke-dasharray": DASHES[mark.style % 6]}, svg);
    } else if (mark.kind === "bars") node("rect", {x: 6, y: 0, width: 14, height: 12, class: `bar s${mark.style}${mark.pale ? " pale" : ""}`}, svg);
    else symbol(svg, 13, 6, mark);
    item.append(mark.name);
  }
  if (box.childElementCount < 2) box.remove();
}

function scale(div, colors) {
  const box = html("div", "scale", div), place = placer(colors, 0, 100);
  html("span", "", box, colors.title);
  const bar = html("div", "ramp", box);
  bar.style.background = `linear-gradient(90deg, ${VIRIDIS.map((rgb) => `rgb(${rgb})`)})`;
  let free = -Infinity;
  for (const [value, text] of colors.ticks) {
    const at = place(value), wide = text.length * 2.4 + 2; // percent of the bar
    if (at - wide / 2 < free || at > 100.5) continue;
    free = at + wide / 2;
    html("small", "", bar, text).style.left = `${at}%`;
  }
}

function symbol(svg, x, y, mark) {
  const shape = [
    (r) => ["circle", {cx: x, cy: y, r}],
    (r) => ["path", {d: `M${x - r} ${y}L${x} ${y - r}L${x + r} ${y}L${x} ${y + r}Z`}],
    (r) => ["rect", {x: x - r * 0.8, y: y - r * 0.8, width: 1.6 * r, height: 1.6 * r}],
    (r) => ["path", {d: `M${x - r} ${y + r * 0.8}L${x} ${y - r}L${x + r} ${y + r * 0.8}Z`}],
    (r) => ["path", {d: `M${x - r} ${y - r * 0.8}L${x} ${y + r}L${x + r} ${y - r * 0.8}Z`}],
    (r) => ["path", {d: `M${x - r} ${y - 1.5}h${r - 1.5}v${1.5 - r}h3v${r - 1.5}h${r - 1.5}v3h${1.5 - r}v${r - 1.5}h-3v${1.5 - r}h${1.5 - r}z`}],
  ][(mark.symbol || 0) % 6](mark.ring ? 7 : 5.5);
  node(shape[0], {...shape[1], class: `${mark.ring ? "ring" : "dot"} s${mark.style}`}, svg);
}

const MARKS = {
  band(svg, panel, mark) {
    const from = Math.max(panel.px(mark.from), panel.left);
    node("rect", {x: from, y: panel.top, width: Math.max(panel.px(mark.to) - from, 0), height: panel.height, class: mark.massive ? "massive" : "large"}, svg);
  },
  lane(svg, panel, mark) {
    const from = Math.max(panel.px(mark.from), panel.left), to = panel.px(mark.to), at = panel.py(mark.row);
    node("rect", {x: from, y: at - 10, width: to - from, height: 20, class: `lane ${mark.massive ? "massive" : "large"}`}, svg);
    const room = mark.text.length * 6.3;
    const inside = mark.late && to - room > panel.left;
    const start = inside ? to - 6 : Math.min(from + 6, panel.right - room);
    node("text", {x: Math.max(start, panel.left + 4), y: at + 4, class: inside ? "note end" : "note"}, svg, mark.text);
    panel.points.push({series: "phases", x: (from + to) / 2, y: at, half: (to - from) / 2, text: `${mark.text}: ${mark.note}`});
  },
  rule(svg, panel, mark) {
    const upright = mark.way === "x", at = upright ? panel.px(mark.at) : panel.py(mark.at);
    const ends = upright ? {x1: at, x2: at, y1: panel.top, y2: panel.bottom} : {x1: panel.left, x2: panel.right, y1: at, y2: at};
    node("line", {...ends, class: "rule"}, svg);
    const text = mark.text || `${mark.name} ${number(mark.at)}`, fits = at + 6 + text.length * 6 < panel.right;
    if (upright) node("text", {x: at + (fits ? 5 : -5), y: panel.top + 11, class: fits ? "note halo" : "note halo end"}, svg, text);
    else node("text", {x: panel.right - 4, y: at - panel.top < 18 ? at + 13 : at - 5, class: "note end halo"}, svg, text);
  },
  line(svg, panel, mark) {
    let path = "";
    const dots = node("g", {});
    mark.x.forEach((value, i) => {
      const amount = mark.y[i];
      if (amount === null || (panel.y.log && amount <= 0)) { path += " "; return; }
      const x = panel.px(value), y = panel.py(amount);
      path += `${path === "" || path.endsWith(" ") ? "M" : "L"}${x.toFixed(1)} ${y.toFixed(1)}`;
      node("circle", {cx: x.toFixed(1), cy: y.toFixed(1), r: 2.2, class: `dot s${mark.style}`}, dots);
      const where = value < 0 ? "embedding" : `${mark.note || "block"} ${value}`, more = mark.notes ? `, ${mark.notes[i]}` : "";
      panel.points.push({series: mark.name, x, y, text: `${mark.name}, ${where}: ${number(amount)}${more}`});
    });
    node("path", {d: path, class: `line s${mark.style}`, "stroke-dasharray": DASHES[mark.style % 6]}, svg);
    svg.append(dots);
  },
  dots(svg, panel, mark) {
    mark.x.forEach((value, i) => {
      if (value === null || mark.y[i] === null) return;
      const x = panel.px(value), y = panel.py(mark.y[i]), span = mark.spans?.[i];
      if (span) {
        const upright = mark.way === "y", [a, b] = span.map((end) => upright ? panel.py(end) : panel.px(end));
        const ends = upright ? {x1: x, x2: x, y1: a, y2: b} : {x1: a, x2: b, y1: y, y2: y};
        node("line", {...ends, class: `line s${mark.style}`}, svg);
        for (const end of [a, b]) node("line", {class: `line s${mark.style}`, ...(upright ? {x1: x - 4, x2: x + 4, y1: end, y2: end} : {x1: end, x2: end, y1: y - 4, y2: y + 4})}, svg);
      }
      symbol(svg, x, y, mark);
      if (mark.texts?.[i]) labelled(svg, panel, x, y, mark.texts[i]);
      if (mark.notes) panel.points.push({series: mark.name, x, y, text: mark.notes[i]});
    });
  },
  bars(svg, panel, mark) {
    panel.stack ||= {};
    const wide = Math.max((panel.right - panel.left) / (mark.x.length + 1) * 0.72, 2);
    mark.x.forEach((value, i) => {
      if (!mark.y[i]) return;
      const from = panel.stack[value] || 0, to = panel.stack[value] = from + mark.y[i];
      const x = panel.px(value), a = panel.py(from), b = panel.py(to);
      node("rect", {x: x - wide / 2, y: b, width: wide, height: Math.max(a - b, 0), class: `bar s${mark.style}${mark.pale ? " pale" : ""}`}, svg);
      panel.points.push({series: mark.name, x, y: (a + b) / 2, half: wide / 2, text: `block ${value}, ${mark.name}: ${number(mark.y[i])}`});
    });
  },
  cells(svg, panel, mark) {
    const colors = figures[svg.parentNode.dataset.chart].colors;
    const part = mark.levels ? null : placer(colors, 0, 1);
    const wide = panel.px(1) - panel.px(0), tall = panel.height / Math.max(mark.rows.length, 1);
    const gap = Math.min(wide, tall) > 10 ? 1 : 0;
    mark.values.forEach((row, r) => row.forEach((value, c) => {
      const known = value !== null && !(colors?.log && value <= 0), x = panel.px(c) - wide / 2, y = panel.top + r * tall;
      const rgb = known && part ? viridis(part(value)) : null;
      const made = node("rect", {x: x.toFixed(2), y: y.toFixed(2), width: (wide - gap).toFixed(2), height: (tall - gap).toFixed(2)}, svg);
      if (mark.levels) made.setAttribute("class", `b${mark.levels.indexOf(value)}`);
      else made.setAttribute("fill", rgb ? `rgb(${rgb})` : "none");
      const text = mark.texts?.[r]?.[c];
      if (text && wide > text.length * 7) {
        const dark = rgb && rgb[0] * 0.3 + rgb[1] * 0.6 + rgb[2] * 0.1 < 120;
        node("text", {x: x + wide / 2, y: y + tall / 2 + 4, class: `cell mid${dark ? " white" : ""}`}, svg, text);
      }
    }));
    Object.assign(panel, {wide, tall});
  },
};

function labelled(svg, panel, x, y, text) {
  const room = text.length * 6.4 + 10;
  const boxes = panel.boxes ||= [];
  for (const [dx, dy, anchor] of [[9, 4, ""], [-9, 4, "end"], [0, -10, "mid"], [0, 18, "mid"]]) {
    const left = anchor === "" ? x + dx : anchor === "end" ? x + dx - room : x - room / 2;
    const box = [left, y + dy - 11, left + room, y + dy + 3];
    if (box[0] < panel.left || box[2] > panel.right + 8 || boxes.some((b) => b[0] < box[2] && box[0] < b[2] && b[1] < box[3] && box[1] < b[3])) continue;
    boxes.push(box);
    node("text", {x: x + dx, y: y + dy, class: `note halo ${anchor}`}, svg, text);
    return;
  }
}

// --- reading a chart: hover, touch, arrow keys --------------------------------------------------------------------

const tip = document.getElementById("tip"), spoken = document.getElementById("spoken");

function cellText(mark, r, c) {
  const parts = [`${mark.columns[c]}, ${mark.called ? mark.called + " " : ""}${mark.rows[r]}: ${number(mark.values[r][c])}${mark.unit || ""}`];
  if (mark.rownotes) parts.push(mark.rownotes[r]);
  if (mark.notes?.[r]?.[c]) parts.push(mark.notes[r][c]);
  return parts.join("\n");
}

function show(div, panel, point, aloud) {
  const {svg, cursor} = div.view, box = svg.getBoundingClientRect(), zoom = box.width / svg.viewBox.baseVal.width;
  const half = point.cell ? [panel.wide / 2, panel.tall / 2] : [point.half || 7, 7];
  cursor.setAttribute("x", point.x - half[0]);
  cursor.setAttribute("y", point.y - half[1]);
  cursor.setAttribute("width", 2 * half[0]);
  cursor.setAttribute("height", 2 * half[1]);
  svg.append(cursor);
  tip.textContent = point.text;
  tip.hidden = false;
  const x = box.left + point.x * zoom, y = box.top + point.y * zoom, own = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - own.width - 4))}px`;
  const above = y - own.height - 14;
  tip.style.top = `${above > 4 ? above : y + 18}px`;
  if (aloud) spoken.textContent = point.text;
}

function hide(div) {
  tip.hidden = true;
  div.view?.cursor.setAttribute("width", 0);
}

function cellPoint(panel, r, c) {
  const rows = panel.map.rows.length, columns = panel.map.columns.length;
  const row = Math.min(Math.max(r, 0), rows - 1), column = Math.min(Math.max(c, 0), columns - 1);
  return {cell: [row, column], x: panel.px(column), y: panel.top + (row + 0.5) * panel.tall, text: cellText(panel.map, row, column)};
}

function hover(div, event) {
  const box = div.view.svg.getBoundingClientRect(), zoom = box.width / div.view.svg.viewBox.baseVal.width;
  const x = (event.clientX - box.left) / zoom, y = (event.clientY - box.top) / zoom;
  const panel = div.view.panels.find((one) => y >= one.top - 6 && y <= one.bottom + 6);
  if (!panel || x < panel.left - 8 || x > panel.right + 12) return hide(div);
  if (panel.map) {
    if (!panel.map.rows.length) return hide(div);
    return show(div, panel, cellPoint(panel, Math.floor((y - panel.top) / panel.tall), Math.round((x - panel.px(0)) / panel.wide)));
  }
  let best = null, least = 40;
  for (const point of panel.points) {
    const away = Math.hypot(Math.max(Math.abs(point.x - x) - (point.half || 0), 0), point.y - y);
    if (away < least) [best, least] = [point, away];
  }
  return best ? show(div, panel, best) : hide(div);
}

function step(div, key) {
  const panels = div.view.panels.filter((panel) => panel.map ? panel.map.rows.length : panel.points.length);
  if (!panels.length) return;
  const at = div.view.at ||= {panel: 0, row: -1, index: -1};
  const [down, right] = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -1e9], End: [0, 1e9]}[key];
  const lists = panels.flatMap((panel) => {
    if (panel.map) return panel.map.rows.map((_, r) => ({panel, size: panel.map.columns.length, point: (i) => cellPoint(panel, r, i)}));
    const series = Map.groupBy ? [...Map.groupBy(panel.points, (point) => point.series).values()] : [panel.points];
    return series.map((points) => ({panel, size: points.length, point: (i) => points[i]}));
  });
  at.row = Math.min(Math.max(at.row < 0 ? 0 : at.row + down, 0), lists.length - 1);
  const list = lists[at.row];
  at.index = Math.min(Math.max(at.index < 0 ? 0 : at.index + right, 0), list.size - 1);
  show(div, list.panel, list.point(at.index), true);
}

function readable(div) {
  div.addEventListener("pointermove", (event) => hover(div, event));
  div.addEventListener("pointerdown", (event) => hover(div, event));
  div.addEventListener("pointerleave", () => hide(div));
  div.addEventListener("blur", () => hide(div));
  div.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide(div);
    if (!/^(Arrow|Home|End)/.test(event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    step(div, event.key);
  });
}
