// Small values that a browser keeps. Where storage is forbidden, nothing is kept and nothing fails.

export function read(storage, name) {
  try {
    return JSON.parse(window[storage].getItem(name));
  } catch {
    return null;
  }
}

/** `null` removes the value. */
export function write(storage, name, value) {
  try {
    if (value === null) window[storage].removeItem(name);
    else window[storage].setItem(name, JSON.stringify(value));
  } catch {
    // until the page is closed
  }
}
