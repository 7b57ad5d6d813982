// The page: a conversation, a drawer for passages, documents and history, and a judgement of every answer.

import * as api from "./api.js";
import { asMarkdown, element, place, showAnswer, showPassage, size } from "./render.js";

const at = (id) => document.getElementById(id);
const CHATS = "qlora-chats"; // in localStorage: [{ id, turns }], the newest first
const MOST_CHATS = 50;
const UNDO = 6000; // milliseconds

const state = { models: {}, model: "", about: {}, chat: { id: Date.now(), turns: [] }, stop: null };

// ---------------------------------------------------------------------------- conversation

function lastTurns() {
  const answered = state.chat.turns.filter((turn) => turn.done).slice(-3);
  return answered.flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.answer },
  ]);
}

async function ask(question) {
  if (state.stop) return; // one question at a time
  const turn = { question, answer: "", unsupported: [], citations: [], nearest: [], done: false };
  const messages = [...lastTurns(), { role: "user", content: question }];
  state.chat.turns.push(turn);
  const shown = showTurn(turn);
  state.stop = new AbortController();
  setBusy(true);
  try {
    await ready; // a question may be faster than the names of the models
    turn.model = state.model;
    await api.ask(turn.model, messages, (event) => take(event, turn, shown), state.stop.signal);
    turn.done = true;
  } catch (error) {
    if (error.name === "AbortError") turn.stopped = true;
    else turn.error = error.message;
    if (error.status === 0) watchServer();
  }
  state.stop = null;
  setBusy(false);
  drawTurn(turn, shown);
  saveChats();
}

function take(event, turn, shown) {
  const choice = event.choices[0];
  if (!choice) return;
  turn.answer += choice.delta.content ?? "";
  if (choice.finish_reason) {
    const { citations, unsupported, refused, nearest, answer, confidence } = event;
    Object.assign(turn, { citations, unsupported, refused, nearest, answer, confidence });
  }
  const atEnd = at("chat").scrollHeight - at("chat").scrollTop - at("chat").clientHeight < 80;
  showAnswer(shown.answer, turn.answer, [], () => null);
  if (atEnd) scrollDown();
}

function showTurn(turn) {
  at("empty").hidden = true;
  const answer = element("div", { class: "answer waiting" });
  const more = element("div");
  at("turns").append(element("li", {}, element("p", { class: "question" }, turn.question), answer, more));
  const shown = { answer, more };
  if (turn.done || turn.error || turn.stopped) drawTurn(turn, shown);
  scrollDown();
  return shown;
}

function drawTurn(turn, { answer, more }) {
  answer.classList.remove("waiting");
  showAnswer(answer, turn.answer, turn.unsupported, (n) => chip(turn, n));
  const remarks = [];
  if (turn.error) remarks.push(element("p", { class: "remark", role: "alert" }, turn.error, " ", again(turn)));
  if (turn.stopped) remarks.push(element("p", { class: "remark" }, "Stopped. ", again(turn)));
  if (turn.unsupported.length) {
    const many = turn.unsupported.length === 1 ? "The marked sentence is" : "The marked sentences are";
    remarks.push(element("p", { class: "remark" }, `${many} not supported by the cited passages.`));
  }
  if (turn.confidence !== undefined && !turn.refused) {
    remarks.push(element("p", { class: "place" }, `Confidence: ${Math.round(100 * turn.confidence)} %`));
  }
  if (turn.refused && turn.nearest.length) {
    remarks.push(element("p", { class: "place" }, `The nearest documents: ${turn.nearest.join(", ")}`));
  }
  const sources = turn.citations.map((found) =>
    element("li", {}, element("button", { type: "button", onclick: () => openPassage(turn, found) }, `[${found.n}] ${place(found)}`)),
  );
  more.replaceChildren(...remarks, element("ul", { class: "sources", "aria-label": "Sources" }, ...sources));
  if (turn.done) more.append(judgeButtons(turn));
  scrollDown();
}

function again(turn) {
  return element("button", { type: "button", onclick: () => ask(turn.question) }, "Ask again");
}

function chip(turn, n) {
  const found = turn.citations.find((one) => one.n === n);
  if (!found) return null;
  const label = `Source ${n}: ${place(found)}${found.supported ? "" : ", which does not support the sentence"}`;
  const look = found.supported ? "chip" : "chip weak";
  return element("button", { type: "button", class: look, title: place(found), "aria-label": label, onclick: () => openPassage(turn, found) }, String(n));
}

function setBusy(busy) {
  at("send").hidden = busy;
  at("stop").hidden = !busy;
  if (!busy) at("question").focus();
}

function scrollDown() {
  at("chat").scrollTop = at("chat").scrollHeight;
}

// ---------------------------------------------------------------------------- judgements

function judgeButtons(turn) {
  const copy = () => navigator.clipboard.writeText(turn.answer).then(() => toast("Copied"));
  const buttons = [element("button", { type: "button", onclick: copy }, "Copy")];
  if (state.about.feedback) {
    const pressed = (rating) => String(turn.rating === rating);
    const good = element("button", { type: "button", "aria-pressed": pressed("good"), "aria-label": "Right answer" }, "Right");
    const bad = element("button", { type: "button", "aria-pressed": pressed("bad"), "aria-label": "Wrong answer" }, "Wrong");
    const mark = () => {
      good.setAttribute("aria-pressed", pressed("good"));
      bad.setAttribute("aria-pressed", pressed("bad"));
    };
    good.onclick = () => judge(turn, { rating: "good" }).then(mark);
    bad.onclick = () => openJudge(turn).then(mark);
    buttons.unshift(good, bad);
  }
  return element("div", { class: "meta" }, ...buttons);
}

async function judge(turn, judgement) {
  const { question, answer, model } = turn;
  const passages = turn.citations.map((found) => found.passage_id);
  try {
    await api.sendFeedback({ question, answer, model, passages, ...judgement });
    turn.rating = judgement.rating;
    saveChats();
    toast("Thank you");
  } catch (error) {
    toast(error.message);
  }
}

function openJudge(turn) {
  const dialog = at("judge");
  at("judge-form").reset();
  dialog.showModal();
  return new Promise((resolve) => {
    at("judge-cancel").onclick = () => dialog.close();
    at("judge-form").onsubmit = async (event) => {
      event.preventDefault();
      const right = at("right-answer").value.trim() || null;
      dialog.close();
      await judge(turn, { rating: "bad", right_answer: right, not_in_documents: at("not-there").checked });
    };
    dialog.onclose = () => setTimeout(resolve, 300);
  });
}

// ---------------------------------------------------------------------------- drawer

function openDrawer(title, ...body) {
  at("drawer-title").textContent = title;
  at("drawer-body").replaceChildren(...body);
  if (!at("drawer").open) at("drawer").showModal();
}

async function openPassage(turn, found) {
  openDrawer(found.source, element("p", { class: "place" }, place(found)), element("p", {}, "Loading …"));
  try {
    const passage = await api.getPassage(found.source, found.passage_id, found.sentence);
    const parts = [element("p", { class: "place" }, place(found)), showPassage(passage)];
    if (state.about.feedback) {
      const right = () => judge(turn, { rating: "good", right_passage: found.passage_id });
      parts.push(element("p", {}, element("button", { type: "button", onclick: right }, "This passage is the right one")));
    }
    openDrawer(found.source, ...parts);
    at("drawer-body").querySelector("mark")?.scrollIntoView({ block: "center" });
  } catch (error) {
    openDrawer(found.source, element("p", { class: "remark" }, error.message));
  }
}

async function openDocuments() {
  const list = element("ul", { class: "files" });
  const drop = makeDrop(list);
  openDrawer("Documents", drop, list);
  await drawDocuments(list, drop);
}

async function drawDocuments(list, drop) {
  let found;
  try {
    found = await api.listDocuments();
  } catch (error) {
    list.replaceChildren(element("li", {}, error.message));
    return;
  }
  drop.hidden = found.read_only;
  drop.querySelector("input").accept = found.types.join(",");
  list.replaceChildren(...found.documents.map((one) => documentLine(one, found.read_only, list)));
  if (!found.documents.length) list.append(element("li", {}, "There are no documents yet."));
}

function documentLine(one, readOnly, list) {
  const detail = `${one.passages} passages, ${size(one.bytes)}`;
  const remove = element("button", { type: "button", "aria-label": `Delete ${one.source}` }, "Delete");
  const line = element("li", {}, element("span", { class: "name" }, one.source), readOnly ? null : remove,
    element("span", { class: "detail" }, detail));
  remove.onclick = () => {
    line.hidden = true; // until the time to undo is over
    toast(`Deleted ${one.source}`, "Undo", () => (line.hidden = false), async () => {
      try {
        await api.deleteDocument(one.source);
        line.remove();
      } catch (error) {
        line.hidden = false;
        toast(error.message);
      }
    });
  };
  return line;
}

function makeDrop(list) {
  const input = element("input", { type: "file", multiple: true, class: "hidden", id: "pick", "aria-label": "Files to add" });
  const pick = element("button", { type: "button", class: "primary", onclick: () => input.click() }, "Choose files");
  const drop = element("div", { class: "drop" }, element("p", {}, "Drop files here, or"), pick, input);
  input.onchange = () => uploadAll([...input.files], list, drop);
  drop.ondragover = (event) => {
    event.preventDefault();
    drop.classList.add("over");
  };
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    uploadAll([...event.dataTransfer.files], list, drop);
  };
  return drop;
}

async function uploadAll(files, list, drop) {
  const failed = [];
  for (const file of files) {
    const bar = element("progress", { max: 1, value: 0, "aria-label": `Upload of ${file.name}` });
    const detail = element("span", { class: "detail" }, "Uploading …");
    const line = element("li", {}, element("span", { class: "name" }, file.name), bar, detail);
    list.prepend(line);
    try {
      const done = await api.upload(file, false, (share) => {
        bar.value = share;
        if (share === 1) detail.textContent = "Reading …";
      });
      if (done.error) failed.push([file.name, done.error]);
    } catch (error) {
      failed.push([file.name, error.message]);
    }
  }
  await drawDocuments(list, drop);
  for (const [name, why] of failed) {
    const detail = element("span", { class: "detail wrong", role: "alert" }, `Not added: ${why}`);
    list.prepend(element("li", {}, element("span", { class: "name" }, name), detail));
  }
  state.about = await api.about();
  drawEmpty();
}

function openHistory() {
  const chats = loadChats();
  const list = element("ul", { class: "files" });
  for (const chat of chats) {
    const open = element("button", { type: "button", onclick: () => openChat(chat) }, chat.turns[0].question);
    list.append(element("li", {}, open, element("span", { class: "detail" }, new Date(chat.id).toLocaleString())));
  }
  if (!chats.length) list.append(element("li", {}, "There are no conversations in this browser yet."));
  const save = element("button", { type: "button", onclick: exportChat, disabled: !state.chat.turns.length }, "Save this conversation as Markdown");
  const clear = element("button", { type: "button", onclick: clearHistory, disabled: !chats.length }, "Delete all");
  openDrawer("History", element("p", {}, save, clear), list);
}

function exportChat() {
  const file = new Blob([asMarkdown(state.chat.turns)], { type: "text/markdown" });
  const link = element("a", { href: URL.createObjectURL(file), download: "conversation.md" });
  link.click();
  URL.revokeObjectURL(link.href);
}

function clearHistory() {
  localStorage.removeItem(CHATS);
  openHistory();
}

function loadChats() {
  try {
    return JSON.parse(localStorage.getItem(CHATS)) ?? [];
  } catch {
    return [];
  }
}

function saveChats() {
  const others = loadChats().filter((chat) => chat.id !== state.chat.id);
  try {
    localStorage.setItem(CHATS, JSON.stringify([state.chat, ...others].slice(0, MOST_CHATS)));
  } catch { /* the browser keeps nothing: the conversation goes on */ }
}

function openChat(chat) {
  state.chat = chat;
  at("turns").replaceChildren();
  chat.turns.forEach(showTurn);
  at("drawer").close();
  drawEmpty();
}

// ---------------------------------------------------------------------------- page

function toast(text, label, undo, later) {
  const shown = element("div", { class: "toast" }, text);
  const end = setTimeout(() => {
    shown.remove();
    later?.();
  }, label ? UNDO : 2500);
  if (label) {
    const act = () => {
      clearTimeout(end);
      shown.remove();
      undo();
    };
    shown.append(element("button", { type: "button", onclick: act }, label));
  }
  (at("drawer").open ? at("drawer") : document.body).append(at("toasts")); // above an open dialog
  at("toasts").append(shown);
}

function drawEmpty() {
  const { passages, examples } = state.about;
  at("empty").hidden = state.chat.turns.length > 0;
  at("empty-text").textContent = passages
    ? "Every answer names the passages that it comes from."
    : "There are no documents yet. Add some with Documents, or: python rag_qlora.py ingest PATH";
  const make = (text) => element("li", {}, element("button", { type: "button", onclick: () => ask(text) }, text));
  at("examples").replaceChildren(...(passages ? examples : []).map(make));
}

function drawModels() {
  const names = Object.keys(state.models);
  at("models").hidden = names.length < 2;
  const make = (name) => {
    const choose = () => {
      state.model = name;
      drawModels();
    };
    return element("button", { type: "button", role: "radio", "aria-checked": String(name === state.model), onclick: choose }, state.models[name] ? "Tuned" : "Base");
  };
  at("models").replaceChildren(...names.map(make));
}

async function watchServer() {
  at("gone").hidden = false;
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    await new Promise((resolve) => setTimeout(resolve, wait));
    if (await api.health().catch(() => false)) break;
  }
  at("gone").hidden = true;
}

function askForKey(wrong) {
  const dialog = at("ask-key");
  at("key-wrong").hidden = !wrong;
  at("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => (at("key-form").onsubmit = () => resolve(at("key").value)));
}

function grow() {
  const box = at("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

function submit(event) {
  event?.preventDefault();
  const text = at("question").value.trim();
  if (!text || state.stop) return;
  at("question").value = "";
  grow();
  ask(text);
}

at("composer").onsubmit = submit;
at("question").oninput = grow;
at("stop").onclick = () => state.stop?.abort();
at("new-chat").onclick = () => openChat({ id: Date.now(), turns: [] });
at("open-history").onclick = openHistory;
at("open-documents").onclick = openDocuments;
at("drawer-close").onclick = () => at("drawer").close();
at("ask-key").oncancel = (event) => event.preventDefault();
document.onkeydown = (event) => {
  const writing = /^(INPUT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape" && state.stop && !document.querySelector("dialog[open]")) state.stop.abort();
  if (event.key === "/" && !writing && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    at("question").focus();
  }
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === at("question")) submit(event);
};

async function start() {
  api.whenKeyIsMissing(askForKey);
  try {
    state.about = await api.about();
  } catch {
    await watchServer();
    return start();
  }
  state.models = state.about.models;
  state.model = Object.keys(state.models)[0];
  drawModels();
  drawEmpty();
  at("question").focus();
}

const ready = start();
