// The page's controls: themes, switches of charts, filters and order of tables.
"use strict";
const {figures, state} = JSON.parse(document.getElementById("figures").textContent);
const divs = [...document.querySelectorAll("[data-chart]")];
const root = document.documentElement, themeButton = document.getElementById("theme");
const darkQuery = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : darkQuery.matches;

function showPlan() {
  for (const part of document.querySelectorAll("[data-policy]")) part.hidden = part.dataset.policy !== state.policy;
}

function labelButton() { themeButton.textContent = isDark() ? "Light theme" : "Dark theme"; }

// A table with filters: a row stays while every control holds "" or the row's own data-….
function filter(box) {
  const table = document.getElementById(box.dataset.filters), controls = [...box.querySelectorAll("[data-by]")];
  const told = box.querySelector("[role=status]");
  const run = () => {
    let shown = 0, all = 0;
    for (const row of table.querySelectorAll("tbody:not(.reference) > tr")) {
      const kept = controls.every(({value, dataset}) => {
        if (value === "") return true;
        if (dataset.by === "text") return row.textContent.toLowerCase().includes(value.toLowerCase());
        return row.dataset[dataset.by] === value;
      });
      row.hidden = !kept;
      all += 1;
      shown += kept;
    }
    told.textContent = shown === all ? `${all} rows` : `${shown} of ${all} rows`;
  };
  for (const control of controls) control.addEventListener("input", run);
  box.hidden = false;
  run();
}

function sortable(table) {
  const body = table.tBodies[table.tBodies.length - 1];
  const key = (row, column) => {
    const cell = row.cells[column];
    if (!cell || (row.querySelector("[data-error]") && column > 1)) return null;
    if (cell.dataset.v === undefined) return cell.textContent.trim();
    return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  };
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    header.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const order = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      const sign = order === "ascending" ? 1 : -1;
      for (const other of headers) other.setAttribute("aria-sort", other === header ? order : "none");
      const rows = [...body.rows].map((row) => [key(row, column), row]);
      rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null)
        : sign * (typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", {numeric: true})));
      body.append(...rows.map(([, row]) => row));
      document.getElementById("spoken").textContent = `sorted by ${button.innerText.replace(/\s+/g, " ")}, ${order}`;
    });
  });
}

function start() {
  showPlan();
  labelButton();
  themeButton.hidden = false;
  for (const div of divs) { draw(div); readable(div); }
  themeButton.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; labelButton(); });
  darkQuery.addEventListener("change", labelButton);
  for (const select of document.querySelectorAll("[data-state]")) {
    select.addEventListener("change", () => {
      state[select.dataset.state] = select.value;
      for (const other of document.querySelectorAll("[data-state]")) { // one state, several switches
        if (other.dataset.state === select.dataset.state) other.value = select.value;
      }
      showPlan();
      divs.forEach(draw);
    });
  }
  document.querySelectorAll("table.sortable").forEach(sortable);
  document.querySelectorAll("[data-filters]").forEach(filter);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    divs.forEach(draw);
  });
  root.dataset.ready = Math.round(performance.now());
}

try {
  start();
} catch (error) {
  record(error);
  const note = document.getElementById("note");
  note.textContent = `The charts could not be drawn: ${error.message}. The text and the tables are complete.`;
  note.hidden = false;
}
