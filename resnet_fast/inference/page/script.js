// The page of `resnet-fast serve`: one image at a time goes to /predict, its labels are shown as bars.
"use strict";

const element = (id) => document.getElementById(id);
const drop = element("drop");
const file = element("file");
const preview = element("preview");
const answer = element("answer");
let current = new AbortController();

function show(id, text) {
  for (const each of ["note", "error", "labels", "time"]) {
    element(each).hidden = each !== id && !(id === "labels" && each === "time");
  }
  if (text !== undefined) {
    element(id).textContent = text;
  }
}

function showImage(image) {
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(image);
  preview.alt = image.name || "The pasted image";
}

function shown(yes) {
  preview.hidden = !yes;
  drop.classList.toggle("full", yes);
}

preview.addEventListener("load", () => shown(true));
preview.addEventListener("error", () => shown(false)); // no image, or one that the server reads and this browser does not

function share(probability) {
  return probability > 0 && probability < 0.001 ? "< 0.1 %" : `${(100 * probability).toFixed(1)} %`;
}

function row({ label, probability }) {
  const item = document.createElement("li");
  for (const [kind, text] of [["name", label], ["share", share(probability)]]) {
    const part = document.createElement("span");
    part.className = kind;
    part.textContent = text;
    item.append(part);
  }
  const track = document.createElement("div");
  const bar = document.createElement("div");
  track.className = "bar";
  bar.style.width = `${100 * probability}%`;
  track.append(bar);
  item.append(track);
  return item;
}

async function classify(image) {
  current.abort();
  const mine = (current = new AbortController());
  showImage(image);
  answer.setAttribute("aria-busy", "true");
  if (element("labels").hidden) {
    show("note", "Looking …");
  }
  try {
    const type = image.type.startsWith("image/") ? image.type : "application/octet-stream";
    const request = { method: "POST", body: image, headers: { "Content-Type": type }, signal: mine.signal };
    const response = await fetch("predict?topk=5", request);
    const found = await response.json();
    if (!response.ok) {
      throw new Error(found.error);
    }
    element("labels").replaceChildren(...found.predictions.map(row));
    show("labels");
    element("time").textContent = `${Math.round(found.milliseconds)} ms on the server`;
  } catch (error) {
    if (mine.signal.aborted) {
      return;
    }
    show("error", error instanceof TypeError ? "The server does not answer." : error.message);
  }
  answer.setAttribute("aria-busy", "false");
}

function first(items) {
  return [...items].find((each) => each.type.startsWith("image/")) || items[0];
}

file.addEventListener("change", () => {
  if (file.files.length) {
    classify(file.files[0]);
  }
  file.value = ""; // so that the same file can be chosen again
});

// A file dropped beside the frame counts too; otherwise the browser would leave the page to show it.
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) {
    drop.classList.remove("over");
  }
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  if (event.dataTransfer.files.length) {
    classify(first(event.dataTransfer.files));
  } else {
    show("error", "That is not a file. Save the image first, then drop the file.");
  }
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    classify(first(event.clipboardData.files));
  }
});

fetch("info")
  .then((response) => response.json())
  .then(({ model, weights, classes }) => {
    element("model").textContent = `${model}, ${weights}, ${classes.toLocaleString("en")} classes`;
  })
  .catch(() => {});
