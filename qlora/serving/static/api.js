// The server's routes. Addresses are relative, so that the page also works below a path of a proxy.

const KEY = "qlora-key";
let askForKey = async () => "";

export class Failure extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function whenKeyIsMissing(ask) {
  askForKey = ask;
}

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}`, ...more } : more;
}

// The response of a route. Asks for the key as long as the server does not take it.
async function request(path, options = {}) {
  for (let wrong = Boolean(sessionStorage.getItem(KEY)); ; wrong = true) {
    let response;
    try {
      response = await fetch(path, { ...options, headers: headers(options.headers) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The server does not answer.", 0);
    }
    if (response.status !== 401) {
      if (!response.ok) throw new Failure(await explain(response), response.status);
      return response;
    }
    sessionStorage.setItem(KEY, await askForKey(wrong));
  }
}

async function explain(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server failed (${response.status}).`;
  }
}

function sendJson(path, value, options = {}) {
  const more = { "Content-Type": "application/json" };
  return request(path, { method: "POST", body: JSON.stringify(value), headers: more, ...options });
}

export const health = async () => (await fetch("health")).ok;
export const about = async () => (await request("about")).json();
export const listDocuments = async () => (await request("documents")).json();
export const deleteDocument = (source) => request(`documents/${path(source)}`, { method: "DELETE" });
export const sendFeedback = (value) => sendJson("feedback", value);

export async function getPassage(source, id, sentence) {
  const query = new URLSearchParams({ sentence });
  return (await request(`documents/${path(source)}/passages/${path(id)}?${query}`)).json();
}

const path = (text) => text.split("/").map(encodeURIComponent).join("/");

// Calls `take` with each event of a streamed answer.
export async function ask(model, messages, take, signal) {
  const response = await sendJson("v1/chat/completions", { model, messages, stream: true }, { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let { value, done } = await reader.read(); !done; { value, done } = await reader.read()) {
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(event.error.message, 500);
      take(event);
    }
  }
  throw new Failure("The answer broke off: the server is gone.", 0);
}

// Uploads a file; `progress` gets shares from 0 to 1. fetch cannot report them.
export function upload(file, replace, progress) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("files", file);
    const sending = new XMLHttpRequest();
    sending.open("POST", `documents?replace=${replace}`);
    for (const [name, value] of Object.entries(headers())) sending.setRequestHeader(name, value);
    sending.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    sending.onerror = () => reject(new Failure("The server does not answer.", 0));
    sending.onload = () => {
      let body = {};
      try {
        body = JSON.parse(sending.responseText);
      } catch { /* a proxy's page */ }
      if (sending.status === 201) resolve(body.files[0]);
      else reject(new Failure(body.error?.message ?? `The upload failed (${sending.status}).`, sending.status));
    };
    sending.send(form);
  });
}
