// Chat with streaming, the choice of model and key, and the clock of the live view.

import { draw } from "/page/live.js";
import { element, seconds } from "/page/plot.js";

const $ = (id) => document.getElementById(id);
let conversation = []; // messages as the API takes them
let running = null; // what stops the answer that is being written

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function status(text, bad = false) {
  $("status").textContent = text;
  $("status").className = bad ? "bad" : "";
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

// Text with ``` fences and `code` made readable; nothing is ever read as HTML.
function show(host, text) {
  const parts = text.split(/^```[^\n]*\n?/m);
  host.replaceChildren(...parts.flatMap((part, i) => {
    if (i % 2) {
      const block = element("pre");
      block.append(part.replace(/\n$/, ""));
      return [block];
    }
    const plain = i ? part.replace(/^\n/, "") : part;
    return plain.split(/`([^`\n]+)`/).map((piece, j) => (j % 2 ? element("code", {}, piece) : piece));
  }));
}

function addMessage(role, text) {
  $("empty").hidden = true;
  const host = element("div", { class: `message ${role}` });
  show(host, text);
  $("messages").append(host);
  $("messages").scrollTop = $("messages").scrollHeight;
  return host;
}

// The data of server-sent events, one JSON value after the other, however the bytes are cut.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const found = (rest + value).split(/\r?\n\r?\n/);
    rest = found.pop();
    for (const event of found) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const text = data.map((line) => line.slice(5).trim()).join("\n");
      if (text === "[DONE]") return;
      if (text) yield JSON.parse(text);
    }
  }
}

function body() {
  const system = $("system").value.trim();
  const asked = { model: $("model").value, stream: true, stream_options: { include_usage: true } };
  asked.messages = system ? [{ role: "system", content: system }, ...conversation] : conversation;
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if ($(name).value !== "") asked[name] = Number($(name).value);
  }
  return JSON.stringify(asked);
}

async function answer() {
  const host = addMessage("assistant", "…");
  const note = element("div", { class: "note" });
  host.after(note);
  const begun = performance.now(), mine = conversation; // which "New chat" puts another in place of
  let text = "", first = 0, last = 0, pieces = 0, usage = null, finish = "";
  running = new AbortController();
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", body: body(), signal: running.signal,
      headers: { "Content-Type": "application/json", ...headers() },
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      finish = choice?.finish_reason ?? finish;
      const piece = choice?.delta?.content;
      if (!piece) continue;
      last = performance.now();
      first ||= last;
      pieces += 1;
      text += piece;
      const messages = $("messages");
      const follows = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 60;
      show(host, text);
      if (follows) messages.scrollTop = messages.scrollHeight;
    }
    if (!text) show(host, "(an empty answer)");
  } catch (error) {
    if (error.name === "AbortError") finish = "stopped";
    else {
      finish = "failed";
      const told = element("div", { class: "error" }, error.message);
      if (text) note.before(told);
      else host.replaceChildren(told);
    }
    if (!text && finish === "stopped") show(host, "(stopped)");
  } finally {
    running = null;
  }
  if (text) mine.push({ role: "assistant", content: text });
  else mine.pop(); // an unanswered question is not asked again with the next one
  const count = usage?.completion_tokens ?? pieces;
  if (first) {
    const speed = last > first ? ` · ${((1000 * (count - 1)) / (last - first)).toFixed(1)} tokens/s` : "";
    note.textContent = `${count} tokens · first after ${seconds((first - begun) / 1000)}${speed} · ${finish}`;
  }
  $("messages").scrollTop = $("messages").scrollHeight;
}

async function send(event) {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  conversation.push({ role: "user", content: text });
  addMessage("user", text);
  $("send").disabled = true;
  $("stop").hidden = false;
  await answer();
  $("send").disabled = false;
  $("stop").hidden = true;
  $("prompt").focus();
}

function clear() {
  running?.abort();
  conversation = [];
  for (const one of $("messages").querySelectorAll(".message, .note, .error")) one.remove();
  $("empty").hidden = false;
}

async function loadModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await failure(response));
  const chosen = $("model").value;
  const names = (await response.json()).data.map((model) => model.id);
  $("model").replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  if (names.includes(chosen)) $("model").value = chosen;
}

let timer = 0, loaded = false, turn = 0;

async function poll() {
  clearTimeout(timer);
  const mine = ++turn;
  let wait = 1000;
  if (!document.hidden) {
    try {
      if (!loaded) await loadModels();
      loaded = true;
      const response = await fetch("/live", { headers: headers() });
      if (!response.ok) throw new Error(await failure(response));
      const state = await response.json();
      if (mine !== turn) return;
      draw(state, $("model").value);
      status("live");
    } catch (error) {
      if (mine !== turn) return;
      loaded = false;
      wait = 3000;
      status(error instanceof TypeError ? "the server does not answer" : error.message, true);
    }
  }
  timer = setTimeout(poll, wait);
}

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  setTheme(now === "dark" ? "light" : "dark");
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  localStorage.setItem("llmos-theme", name);
}

$("form").addEventListener("submit", send);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
$("theme").addEventListener("click", theme);
$("model").addEventListener("change", poll);
$("key").addEventListener("change", () => {
  sessionStorage.setItem("llmos-key", $("key").value); // forgotten with the tab
  loaded = false;
  poll();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });

$("key").value = sessionStorage.getItem("llmos-key") ?? "";
if (localStorage.getItem("llmos-theme")) setTheme(localStorage.getItem("llmos-theme"));
poll();
