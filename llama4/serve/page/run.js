// One reply being written: what comes from the server goes into its message.

import { stream } from "./api.js";

export class Run {
  constructor(conversation, message) {
    this.conversation = conversation;
    this.message = message;
    this.abort = new AbortController();
  }

  stop() {
    this.abort.abort();
  }

  /** Stop, and keep nothing: the conversation was deleted. */
  discard() {
    this.isDiscarded = true;
    this.stop();
  }

  /** Until the reply has ended, however it does. `onPiece` is called when something has come. */
  async write(body, key, onPiece) {
    const { message } = this;
    const begun = performance.now();
    let first = null;
    let last = begun;
    let pieces = 0;
    try {
      for await (const piece of stream(body, key, this.abort.signal)) {
        if (piece.text || piece.toolCalls) {
          last = performance.now();
          first ??= last;
          pieces++;
        }
        if (piece.text) message.text += piece.text;
        if (piece.toolCalls) addCalls(message, piece.toolCalls);
        if (piece.finish) message.finish = piece.finish;
        if (piece.usage) message.usage = piece.usage;
        onPiece();
      }
    } catch (error) {
      if (error.name === "AbortError") message.finish = "stopped";
      else {
        message.problem = error.message;
        message.status = error.status;
      }
    }
    message.tokens = message.usage?.completion_tokens ?? pieces;
    message.seconds = (last - (first ?? last)) / 1000;
    message.wait = first === null ? null : (first - begun) / 1000;
  }
}

function addCalls(message, deltas) {
  message.toolCalls ??= [];
  for (const { index, id, function: { name, arguments: given } = {} } of deltas) {
    const call = (message.toolCalls[index] ??= { id: "", name: "", arguments: "" });
    if (id) call.id = id;
    if (name) call.name = name;
    call.arguments += given ?? "";
  }
}
