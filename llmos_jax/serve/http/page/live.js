// The live view: asks the server for its state once a second and draws it.

import { dots, element, lines, map, quantile, seconds, shares, short } from "/page/plot.js";

const SPAN = 180; // seconds of history, kept here; the server keeps none
const COLOURS = 8;
const $ = (id) => document.getElementById(id);
const slots = new Map(); // tenant -> its colour, for as long as the page is open
const history = new Map(); // model -> [{time, running, waiting, generated}]

function slot(tenant) {
  if (!slots.has(tenant)) slots.set(tenant, `t${slots.size % COLOURS}`);
  return slots.get(tenant);
}

const named = (tenant) => tenant || "(no key)";

function remember(model, time, stats) {
  if (!history.has(model)) history.set(model, []);
  const past = history.get(model);
  past.push({ time, running: stats.running ?? 0, waiting: stats.waiting ?? 0, generated: stats.generated_tokens ?? 0 });
  while (past.length && time - past[0].time > SPAN) past.shift();
  return past;
}

function rate(past) {
  const last = past.at(-1), first = past.findLast((point) => last.time - point.time >= 4) ?? past[0];
  const spent = last.time - first.time;
  return spent > 0 ? Math.max(0, last.generated - first.generated) / spent : 0;
}

const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");

function cards(stats, past) {
  const told = [
    ["running", stats.running],
    ["waiting", stats.waiting],
    ["tokens/s", short(rate(past))],
    ["pages held", percent(stats.used, stats.blocks)],
    ["prefix hits", percent(stats.hits, stats.queries)],
    ["preemptions", stats.preemptions],
  ];
  if (stats.draft_tokens) told.push(["drafts taken", percent(stats.accepted_tokens, stats.draft_tokens)]);
  $("cards").replaceChildren(...told.map(([name, value]) => {
    const card = element("div", { class: "card" });
    card.append(element("b", {}, String(value ?? "–")), element("span", {}, name));
    return card;
  }));
}

function pages(stats) {
  if (!stats.blocks) return;
  const groups = [];
  let held = 0;
  for (const [tenant, count] of Object.entries(stats.tenant_pages ?? {})) {
    if (!count) continue;
    // Tenants that share a page each count it, so the sum may exceed the pages that are held.
    const part = Math.min(count, stats.used - held);
    if (part <= 0) break;
    held += part;
    groups.push({ name: named(tenant), count: part, class: slot(tenant) });
  }
  if (stats.used > held) groups.push({ name: "held", count: stats.used - held, class: "c1" });
  groups.push({ name: "cached", count: stats.cached, class: "ccached" });
  groups.push({ name: "free", count: stats.free, class: "cfree" });
  const each = map($("pages"), groups);
  const legend = groups.slice(-10).flatMap(({ name, count, class: style }) =>
    [element("i", { class: style }), `${name} ${short(count)}`]);
  if (each > 1) legend.push(` · a cell is ${each} pages`);
  $("pages-legend").replaceChildren(...legend);
}

function latencies(latency) {
  for (const [name, label] of [["ttft", "Time to first token"], ["itl", "Time between tokens"]]) {
    const points = latency[name], values = points.map((point) => point[1]);
    dots($(name), points, label);
    const told = values.length ? `p50 ${seconds(quantile(values, 0.5))} · p99 ${seconds(quantile(values, 0.99))}` : "";
    $(`${name}-summary`).textContent = told;
  }
}

export function draw(state, model) {
  for (const [name, stats] of Object.entries(state.models)) remember(name, state.time, stats);
  $("live").classList.remove("blank");
  const name = model in state.models ? model : Object.keys(state.models)[0];
  if (name !== undefined) {
    const stats = state.models[name], past = history.get(name);
    cards(stats, past);
    const series = [["l1", "running"], ["l2", "waiting"]].map(([style, key]) =>
      ({ class: style, points: past.map((point) => [point.time, point[key]]) }));
    const span = Math.min(SPAN, Math.max(30, state.time - past[0].time));
    lines($("batch"), series, { now: state.time, span, label: "Running and waiting sequences over time" });
    pages(stats);
  }
  latencies(state.latency);
  const tenants = Object.entries(state.tenants).sort((a, b) => b[1] - a[1]).slice(0, 12);
  shares($("tenants"), tenants.map(([tenant, value]) => ({ name: named(tenant), value, class: slot(tenant) })));
}
