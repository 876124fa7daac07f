// Pictures of the message to come: chosen, pasted, or dropped anywhere on the page.

import { $, announce, element, icon, toast } from "./dom.js";

const AS_THEY_ARE = new Set(["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"]);
const MAX_BYTES = 8 * 2 ** 20; // of a file that is sent as it is
const MAX_SIDE = 4096;
const MAX_PICTURES = 16;

export class Pictures {
  constructor(onChange) {
    this.urls = [];
    this.isAllowed = true;
    this.onChange = onChange;
    $("attach").addEventListener("click", () => $("files").click());
    $("files").addEventListener("change", () => {
      this.add($("files").files);
      $("files").value = "";
    });
    document.addEventListener("paste", (event) => {
      if (event.target.closest?.("dialog") || !event.clipboardData?.files.length) return;
      event.preventDefault();
      this.add(event.clipboardData.files);
    });
    this.watchDrops();
  }

  watchDrops() {
    let depth = 0;
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    const shown = (isShown) => $("drop").classList.toggle("is-shown", isShown);
    addEventListener("dragenter", (event) => hasFiles(event) && shown(++depth > 0));
    addEventListener("dragleave", (event) => hasFiles(event) && shown(--depth > 0));
    addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      shown((depth = 0) > 0);
      this.add(event.dataTransfer.files);
    });
  }

  allow(isAllowed) {
    this.isAllowed = isAllowed;
    $("attach").hidden = !isAllowed;
    $("welcome-hint").textContent = isAllowed ? "Write a message, or drop a picture anywhere." : "Write a message.";
  }

  async add(files) {
    if (!this.isAllowed) return toast("This model does not see pictures.");
    for (const file of files) {
      if (this.urls.length >= MAX_PICTURES) return toast(`A message has at most ${MAX_PICTURES} pictures.`);
      try {
        this.urls.push(await read(file));
        announce(`Added ${file.name || "a picture"}`);
      } catch {
        toast(`${file.name || "This"} is not a picture that can be read.`);
      }
      this.draw();
    }
    $("message").focus();
  }

  /** The pictures, which are then no longer here. */
  take() {
    const taken = this.urls;
    this.urls = [];
    this.draw();
    return taken;
  }

  draw() {
    const items = this.urls.map((url, i) => {
      const remove = () => {
        this.urls.splice(i, 1);
        this.draw();
        $("message").focus();
      };
      const button = element("button", { type: "button", "aria-label": `Remove picture ${i + 1}`, on: { click: remove } }, icon("close"));
      return element("li", {}, element("img", { src: url, alt: `Picture ${i + 1}` }), button);
    });
    $("attached").replaceChildren(...items);
    this.onChange();
  }
}

/** A file as a data: address: as it is if it is small and of a common format, else drawn again. */
async function read(file) {
  const bitmap = await createImageBitmap(file); // fails if it is no picture
  if (AS_THEY_ARE.has(file.type) && file.size <= MAX_BYTES) return asAddress(file);
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = element("canvas", { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

function asAddress(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
