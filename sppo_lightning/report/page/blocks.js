// The data in the page: compressed blocks that are opened when they are needed.

const HELD = 24; // blocks of texts that stay open
const opened = new Map();

function unpack(name) {
  const node = document.getElementById(name);
  if (!node) throw new Error(`the part ${name} of this file is not there: it may be cut short`);
  const letters = node.textContent;
  const bytes = Uint8Array.fromBase64
    ? Uint8Array.fromBase64(letters)
    : Uint8Array.from(atob(letters), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

const wholeFile = new Promise((resolve) => {
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", resolve);
  else resolve();
});

// The texts of a block, by key; the blocks that were opened last stay in memory.
async function texts(number) {
  await wholeFile;
  const name = `b${number}`;
  const known = opened.get(name) ?? unpack(name);
  opened.delete(name);
  opened.set(name, known);
  if (opened.size > HELD) opened.delete(opened.keys().next().value);
  return known;
}
