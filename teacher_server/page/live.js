"use strict";
// Asks for /status every two seconds while the page is looked at. What clients call themselves is only ever text.
const EVERY_MS = 2000;
const STATUS = new URL("status", location.href);
STATUS.username = STATUS.password = ""; // a key in the page's own address is not taken by fetch
const at = (id) => document.getElementById(id);
const put = (id, text) => { at(id).textContent = text; };

function number(value) {
  if (value >= 1e6) return (value / 1e6).toFixed(value < 1e7 ? 2 : 1) + " M";
  if (value >= 1e4) return (value / 1e3).toFixed(value < 1e5 ? 1 : 0) + " k";
  return value >= 100 || Number.isInteger(value) ? Math.round(value).toString() : value.toFixed(1);
}
const seconds = (value) => value === null ? "–" : value < 10 ? value.toFixed(3) : value.toFixed(1);
const share = (value) => value === null ? "–" : Math.round(100 * value) + " %";
const both = (latency) => latency.calls ? seconds(latency.p50) + ", " + seconds(latency.p99) : "–";
const bytes = (value) => value < 2 ** 30 ? (value / 2 ** 20).toFixed(0) + " MiB" : (value / 2 ** 30).toFixed(1) + " GiB";
function ago(value) {
  if (value < 2) return "now";
  if (value < 120) return Math.round(value) + " s ago";
  if (value < 7200) return Math.round(value / 60) + " min ago";
  return Math.round(value / 3600) + " h ago";
}
const clock = (epoch) => new Date(1000 * epoch).toLocaleTimeString();

function rows(id, columns, found, none) {
  const body = at(id);
  body.replaceChildren();
  for (const { cells, kind } of found) {
    const row = body.insertRow();
    if (kind) row.className = kind;
    for (const cell of cells) {
      const place = row.insertCell();
      const { text, small, kind: inside } = typeof cell === "object" ? cell : { text: cell };
      place.textContent = text;
      if (inside) place.className = inside;
      if (small) {
        const beside = document.createElement("small");
        beside.textContent = small;
        place.append(beside);
      }
    }
  }
  if (!found.length) {
    const place = body.insertRow().insertCell();
    place.colSpan = columns;
    place.className = "none";
    place.textContent = none;
  }
}

function chart(history) {
  const top = Math.max(1, ...history.flatMap((one) => [one.scored, one.generated, one.cached]));
  const slots = 119;
  const x = (i) => (600 * (slots - history.length + 1 + i) / slots).toFixed(1);
  const path = (name, kind, end) => {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const points = history.map((one, i) => x(i) + "," + (119 - 118 * one[name] / top).toFixed(1));
    line.setAttribute("class", kind);
    line.setAttribute("d", points.length ? "M" + points.join("L") + end : "");
    return line;
  };
  at("chart").replaceChildren(
    path("scored", "area", "L600,120L" + x(0) + ",120Z"),
    ...["cached", "generated", "scored"].map((name) => path(name, name, "")),
  );
  put("chart-top", history.length ? number(top) : "");
}

function client(one) {
  const name = { text: one.name, small: [one.label, one.transport].filter(Boolean).join(" · ") };
  return {
    kind: one.in_flight || one.idle_s < 30 ? "" : "idle",
    cells: [
      name, one.in_flight, number(one.waiting_tokens), number(one.rates.scored), number(one.rates.generated),
      number(one.rates.cached), share(one.known_share), both(one.score), both(one.generate), number(one.calls), { text: number(one.failed), kind: one.failed ? "bad" : "" },
      ago(one.idle_s),
    ],
  };
}

function show(s) {
  document.title = (s.ready ? "" : "✕ ") + (s.name || "Teacher");
  put("name", s.name || "Teacher");
  put("state", s.state);
  at("state").className = "state " + (s.ready ? "good" : s.state.includes("loading") ? "" : "bad");
  const kind = [s.engine, s.dtype, s.quantization === "none" ? "" : s.quantization].filter(Boolean).join(" · ");
  put("about", [kind, s.fingerprint.slice(0, 12), "up " + ago(s.up_s).replace(" ago", "")].filter(Boolean).join(" · "));
  for (const name of ["scored", "generated", "cached"]) put(name, number(s.rates[name]));
  put("calls", number(s.clients.reduce((sum, one) => sum + one.in_flight, 0)));
  put("queue", number(s.queue_tokens));
  put("queue-limit", "of " + number(s.queue_tokens_limit) + " tokens");
  const all = Object.values(s.sequences).reduce((sum, one) => sum + one, 0);
  put("hits", all ? share(1 - (s.sequences.engine || 0) / all) : "–");
  chart(s.history);
  rows("clients", 12, s.clients.map(client), "Nobody has called yet.");
  rows("latency", 5, Object.entries(s.latency).map(([name, one]) => (
    { cells: [name, seconds(one.p50), seconds(one.p90), seconds(one.p99), number(one.calls)] })), "");
  const restarts = s.restarts ? s.restarts + (s.restarts === 1 ? " restart" : " restarts") : "no restarts";
  put("engine-state", restarts + (s.last_step_s === null ? "" : ", last step " + ago(s.last_step_s)));
  rows("steps", 6, Object.entries(s.steps).map(([name, one]) => ({ cells: [
    name, number(one.sequences), number(one.tokens), seconds(one.steps ? one.seconds : null),
    one.steps && name === "score" ? share(one.readout_share) : "–", number(s.submitted_tokens[name] || 0),
  ] })), "");
  const sizes = {
    memory: bytes(s.cache_bytes) + " of " + bytes(s.cache_limit),
    disk: s.disk_limit ? bytes(s.disk_bytes) + " of " + bytes(s.disk_limit) : "off",
  };
  const names = { memory: "memory", disk: "disk", joined: "an equal one in flight", engine: "the engine" };
  rows("sources", 4, Object.entries(names).map(([key, name]) => ({ cells: [
    name, number(s.sequences[key] || 0), all ? share((s.sequences[key] || 0) / all) : "–", sizes[key] || "",
  ] })), "");
  rows("errors", 6, s.errors.map((one) => ({ cells: [
    clock(one.at), one.client, one.method + " · " + one.transport, { text: one.reason, kind: "bad" },
    { text: one.detail || "in the log", kind: "detail" }, { text: one.request_id, kind: "request" },
  ] })), "None.");
  put("at", "as of " + clock(s.now));
}

let lost = null;
async function look() {
  try {
    const answer = await fetch(STATUS, { cache: "no-store" });
    const body = await answer.json();
    if (!answer.ok) throw new Error(body.detail);
    show(body);
    lost = null;
  } catch (error) {
    lost = lost || new Date();
    put("lost", "No answer since " + lost.toLocaleTimeString() + " (" + error.message + "). Trying again.");
  }
  at("lost").hidden = lost === null;
}

async function follow() {
  for (;;) {
    if (!document.hidden) await look();
    await new Promise((done) => setTimeout(done, EVERY_MS));
  }
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
follow();
