// Asks the server about a picture and writes what it answers; names go into the page as text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const percent = (p) => `${(100 * p).toFixed(p > 0 && p < 0.001 ? 3 : 1)} %`;
const plain = (name) => name.replaceAll("_", " ");
let facts = null;
let picture = null; // the file that is shown
let asked = 0; // of several questions the last one counts

function make(kind, text = "", name = "") {
  const found = document.createElement(kind);
  found.textContent = text;
  found.className = name;
  return found;
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").className = bad ? "bad" : "";
}

function bar(side, value, most, text = percent(value), who = side) {
  const line = make("div", "", `bar ${side}${text === "masked" ? " left-out" : ""}`);
  const track = make("div", "", "track");
  const fill = make("div", "", "fill");
  fill.style.setProperty("--share", most > 0 ? value / most : 0);
  track.append(fill);
  const shown = make("span", "", "value");
  shown.append(make("span", `${who} `, "apart"), text);
  line.append(track, shown);
  return line;
}

function row(name, marks, bars, kind = "") {
  const line = make("li", "", `row ${kind}`);
  const title = make("div", name, "name");
  if (marks) title.append(make("small", marks));
  const all = make("div");
  all.append(...bars);
  line.append(title, all);
  return line;
}

function show(answer) {
  const { rows, others, networks, confidence } = answer;
  const sides = ["teacher", "refined", "student"];
  const most = Math.max(...rows.flatMap((one) => sides.map((side) => one[side])));
  const bars = (one, scale, masked) =>
    sides.map((side) => {
      const who = side === "refined" ? "refined teacher" : side;
      return bar(side, one[side], scale, side === "refined" && masked ? "masked" : percent(one[side]), who);
    });
  const marks = (one) =>
    [one.true && "label", ...["teacher", "student"].map((role) => networks[role].class === one.class && role)];
  $("heading").textContent = `Probabilities, at temperature ${answer.temperature}`;
  $("rows").replaceChildren(
    ...rows.map((one) => {
      const said = marks(one).filter(Boolean).join(", ");
      const kind = `${one.masked ? "masked" : ""} ${one.true ? "true" : ""}`;
      return row(plain(one.class), said, bars(one, most, one.masked), kind);
    }),
  );
  if (others.count > 0) {
    const said = others.masked ? `${others.masked} of them masked` : "none of them masked";
    const name = others.count === 1 ? "1 other" : `${others.count} others, together`;
    $("rows").append(row(name, said, bars(others, 0, others.masked === others.count), "others"));
  }
  $("sure").textContent = `Confidence (SCD), at temperature ${answer.confidence_temperature}`;
  $("confidence").replaceChildren(
    row("teacher", "in its favourite", [bar("teacher", confidence.teacher, 1)]),
    row("student", "in the label", [bar("student", confidence.student, 1)]),
  );
  $("words").replaceChildren(...answer.words.map((text) => make("li", text)));
  $("terms").replaceChildren(
    ...Object.entries(answer.terms).map(([name, value]) => {
      const one = make("div");
      const meant = { scd: "SCD", mcd: "MCD", ce: "CE", kd: "plain KD" }[name] ?? name;
      one.append(make("dt", meant), make("dd", value.toPrecision(3)));
      return one;
    }),
  );
  $("networks").tBodies[0].replaceChildren(
    ...["teacher", "student"].map((role) => {
      const line = make("tr");
      const head = make("th", role);
      head.scope = "row";
      const { class: name, probability, milliseconds } = networks[role];
      line.append(head, make("td", plain(name)), make("td", percent(probability), "number"));
      line.append(make("td", `${milliseconds.toPrecision(3)} ms`, "number"));
      return line;
    }),
  );
  $("label").value = String(answer.label);
  $("seen").src = answer.seen;
  $("given").hidden = $("result").hidden = false;
}

async function ask(label = null) {
  const mine = ++asked;
  say("Asking both networks …");
  try {
    const where = label === null ? "/ask" : `/ask?label=${label}`;
    const reply = await fetch(where, { method: "POST", headers: { "Content-Type": picture.type }, body: picture });
    const answer = await reply.json();
    if (mine !== asked) return;
    if (!reply.ok) throw new Error(answer.error);
    show(answer);
    say(answer.masked === 0 ? "No class is masked." : `${answer.masked} of ${facts.classes.length} classes masked.`);
  } catch (error) {
    if (mine !== asked) return;
    const gone = error instanceof TypeError;
    say(gone ? "The program does not answer: is it still running?" : error.message, true);
    if (label === null) $("given").hidden = $("result").hidden = true; // nothing stays that is of another picture
  }
}

function take(file) {
  if (!file || !facts) return;
  const wrong = !facts.types.includes(file.type)
    ? "JPEG, PNG and WebP pictures are taken, nothing else."
    : file.size > facts.most_bytes
      ? `This file has ${(file.size / 1e6).toFixed(1)} MB; at most ${facts.most_bytes / 1e6} are taken.`
      : "";
  if (wrong) return say(wrong, true);
  picture = file;
  URL.revokeObjectURL($("picture").src);
  $("picture").src = URL.createObjectURL(file);
  ask();
}

async function start() {
  facts = await (await fetch("/facts")).json();
  const { names, settings } = facts;
  const how = facts.rld ? "" : ` It was distilled with ${facts.method}; shown is what RLD would pass on.`;
  $("about").textContent =
    `${names.student} learned from ${names.teacher}; alpha ${settings.alpha}, beta ${settings.beta}, ` +
    `temperature ${settings.temperature}.${how}`;
  $("limits").textContent = `JPEG, PNG or WebP, up to ${facts.most_bytes / 1e6} MB; it stays on this machine.`;
  $("timing").textContent = `Time of one image alone, median of some passes, on ${facts.device}.`;
  $("file").accept = facts.types.join(",");
  const order = facts.classes.map((name, index) => [plain(name), index]);
  order.sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
  $("label").replaceChildren(...order.map(([name, index]) => new Option(name, String(index))));
}

$("file").addEventListener("change", (event) => take(event.target.files[0]));
$("label").addEventListener("change", (event) => ask(event.target.value));
$("seen").addEventListener("load", ({ target }) => target.classList.toggle("small", target.naturalWidth < 128));
addEventListener("paste", (event) => take(event.clipboardData?.files[0]));
for (const kind of ["dragenter", "dragover"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
addEventListener("dragleave", (event) => event.relatedTarget === null && $("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
start().catch(() => say("The program does not answer: is it still running?", true));
