// Talking to the server.

export class Unreachable extends Error {}

export async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const failure = await response.json().catch(() => ({}));
  const detail = [failure.detail, failure.error?.message].find(text => typeof text === "string") ?? `the server answered with status ${response.status}`;
  throw Object.assign(new Error(detail), {code: failure.code, status: response.status});
}
export const post = (path, body, signal) => ask(path, {method: "POST", signal, headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});

export async function* events(response) {
  const decoder = new TextDecoder(), reader = response.body.getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read().catch(error => { throw error.name === "AbortError" ? error : new Unreachable("The connection broke off."); });
    if (done) return;
    const lines = (rest + decoder.decode(value, {stream: true})).split("\n\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
  }
}
