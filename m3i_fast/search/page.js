// Asks the server for what is nearest, and shows it. All text from data is set as text, never as markup.
(() => {
  const about = JSON.parse(document.getElementById("about").textContent);
  const at = (id) => document.getElementById(id);
  const grid = about.grid, MOST_RESULTS = 96;
  let asked = null;  // {words}, {query} or {row}: what the pictures on the page are the answer to
  let shown = [];  // the results on the page
  const turns = { search: 0, patch: 0 };  // of the newest requests: what older ones answer is dropped
  const busy = new Set();  // of these kinds
  let pointed = Math.floor((grid * grid) / 2);  // the cell under the mouse, or that keys move
  let chosen = null;  // the cell that is found in the results

  // ---- Asking ---------------------------------------------------------------------------------

  async function post(path, body, type) {
    let answer;
    try {
      const response = await fetch(path, { method: "POST", body, headers: { "Content-Type": type } });
      answer = await response.json();
    } catch (error) {
      throw new Error(`No answer from the server (${error.message}). Is m3i-fast search still running?`);
    }
    if (answer.error) throw new Error(answer.error);
    return answer;
  }

  const ask = (path, question) => post(path, JSON.stringify(question), "application/json");

  // Runs one question; its error is shown in the page, and what an older one of its kind answers is dropped.
  async function answered(kind, question, show, failed = fail) {
    const mine = begin(kind);
    at("error").hidden = true;
    try {
      const answer = await question();
      if (mine === turns[kind]) show(answer);
    } catch (error) {
      if (mine === turns[kind]) failed(error.message);
    } finally {
      if (mine === turns[kind]) end(kind);
    }
  }

  function begin(kind) {
    busy.add(kind);
    at("hits").setAttribute("aria-busy", "true");
    return ++turns[kind];
  }

  // Ends the newest request of a kind; what it may still answer is dropped.
  function end(kind) {
    turns[kind]++;
    busy.delete(kind);
    if (!busy.size) at("hits").removeAttribute("aria-busy");
  }

  function fail(message) {
    at("error").textContent = message;
    at("error").hidden = false;
  }

  function chosenClass() {
    const value = at("class")?.value;
    return value ? Number(value) : null;
  }

  function search(question, num = about.results) {
    return answered(
      "search",
      () => ask("search", { ...question, class: chosenClass(), num }),
      (answer) => showFound(question, answer, num),
    );
  }

  async function searchPicture(file) {
    if (!file) return;
    if (file.size > about.bytes) {
      end("search");
      fail(`${file.name}: expected at most ${about.bytes / 2 ** 20} MiB, got ${(file.size / 2 ** 20).toFixed(1)} MiB.`);
      return;
    }
    let encode_ms = 0, added;
    await answered(
      "search",
      async () => {
        const answer = await post("add", file, "application/octet-stream").catch((error) => {
          throw new Error(`${file.name || "The picture"}: ${error.message}`);
        });
        encode_ms = answer.encode_ms;
        added = { query: answer.query.id };
        return ask("search", { ...added, class: chosenClass(), num: about.results });
      },
      (answer) => {
        if (at("words")) at("words").value = "";
        showFound(added, { ...answer, encode_ms }, about.results);
      },
    );
  }

  // ---- Showing --------------------------------------------------------------------------------

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;
  const time = (ms) => (ms < 1000 ? `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
  const pictures = (number) => `${number.toLocaleString("en")} picture${number === 1 ? "" : "s"}`;

  function showFound(question, answer, num) {
    const isSame = answer.query && asked?.query === answer.query.id;
    asked = answer.query ? { query: answer.query.id } : question;
    shown = answer.results;
    showQuery(answer.query, isSame);
    at("found").hidden = false;
    const among = at("class")?.value ? " of this class" : "";
    at("told").textContent = shown.length
      ? `The ${shown.length} nearest of ${pictures(answer.searched)}${among}, by cosine: compared in ${time(answer.search_ms)}, `
        + `after ${time(answer.encode_ms)} for ${answer.query ? "the picture" : "the words"}. ${answer.note}`
      : `There are no other pictures${among}.`;
    at("hits").replaceChildren(...shown.map(hit));
    at("more").hidden = shown.length < num || num >= MOST_RESULTS || shown.length >= answer.searched;
    at("more").onclick = () => search(asked, Math.min(2 * num, MOST_RESULTS));
    if (isSame && chosen !== null) findPatch(chosen);
  }

  function hit(result) {
    const title = result.captions[0] || result.label || result.name;
    const image = make("img", { src: `thumbnail/${result.row}?${about.version}`, alt: title, width: 288, height: 288 });
    const thumb = make("button", { type: "button", className: "thumb", title: "Search with this picture", onclick: () => searchRow(result.row) }, image);
    thumb.setAttribute("aria-label", `Search with this picture: ${title}`);
    const first = make("p", {}, make("b", { textContent: result.similarity.toFixed(3), title: "cosine with what you searched for" }));
    if (result.label !== null) first.append(" ", make("span", { className: "category", textContent: result.label, title: "class" }));
    const item = make("li", {}, thumb, first);
    for (const caption of result.captions) item.append(make("p", { className: "caption" }, make("q", { textContent: caption })));
    if (result.guess) {
      item.append(make("p", { className: "note", textContent: `guess: ${result.guess.name}, ${percent(result.guess.probability)}` }));
    }
    const whole = { href: `picture/${result.row}?${about.version}`, target: "_blank", rel: "noopener", title: "The whole picture" };
    item.append(make("p", { className: "note" }, make("a", { ...whole, textContent: result.name })));
    return item;
  }

  function showQuery(query, isSame) {
    at("query").hidden = !query;
    if (isSame) return;
    clearPatch();
    if (!query) return;
    at("seen").querySelector("img")?.remove();
    at("seen").prepend(make("img", { src: query.picture, alt: "The picture that was searched with, as the model sees it" }));
    at("guesses")?.replaceChildren(...query.guesses.map((guess) => make(
      "li", {},
      make("span", { className: "name", textContent: guess.name, title: guess.name }),
      make("span", { className: "track" }, Object.assign(make("span"), { style: `width: ${100 * guess.probability}%` })),
      make("span", { className: "value", textContent: percent(guess.probability) }),
    )));
  }

  function searchRow(row) {
    if (at("words")) at("words").value = "";
    search({ row }).then(() => at("query").hidden || at("query").scrollIntoView({ block: "nearest" }));
  }

  // ---- Patches --------------------------------------------------------------------------------

  function place(element, cell) {
    const [left, top] = [cell % grid, Math.floor(cell / grid)].map((n) => `${(100 * n) / grid}%`);
    const side = `${100 / grid}%`;
    Object.assign(element.style, { left, top, width: side, height: side });
    element.hidden = false;
  }

  function clearPatch() {
    end("patch");
    chosen = null;
    for (const id of ["pointed", "chosen", "patch"]) at(id).hidden = true;
    for (const drawn of document.querySelectorAll(".thumb canvas, .thumb .cell, .of-patch")) drawn.remove();
  }

  function findPatch(cell) {
    if (!shown.length || !asked?.query) return;
    pointed = chosen = cell;
    place(at("chosen"), cell);
    at("patch").hidden = false;
    at("patch-told").textContent = "Looking at each patch of these pictures ...";
    const rows = shown.map((result) => result.row);
    answered(
      "patch",
      () => ask("patches", { query: asked.query, cell, rows }),
      (answer) => showPatch(cell, answer),
      (message) => {
        at("patch-told").textContent = "This patch was not looked for.";
        fail(message);
      },
    );
  }

  function showPatch(cell, answer) {
    const read = answer.similarity.filter((values) => values !== null);
    const all = read.flat().sort((a, b) => a - b);
    if (!all.length) {
      at("patch-told").textContent = "None of these pictures can be read any more.";
      return;
    }
    const low = all[Math.floor(all.length / 2)], high = all[all.length - 1];
    const items = [...at("hits").children];
    answer.similarity.forEach((values, i) => drawHeat(items[i], values, low, high));
    const now = answer.encoded ? `, ${answer.encoded} of them encoded for it` : "";
    at("patch-told").textContent = `Patch in row ${Math.floor(cell / grid) + 1}, column ${(cell % grid) + 1} of ${grid}: `
      + `bright where patches are alike, cosine ${high.toFixed(2)} at best; framed is the best of each picture. `
      + `${pictures(read.length)} in ${time(answer.ms)}${now}.`
      + (read.length < items.length ? ` ${pictures(items.length - read.length)} can no longer be read.` : "");
  }

  // From patches that are as alike as half of all are to the most alike: red, green, blue, opacity.
  const HEAT = [[14, 18, 54, 0.74], [150, 44, 110, 0.56], [255, 176, 0, 0.22]];

  function heat(t) {
    const below = Math.min(Math.floor(t * (HEAT.length - 1)), HEAT.length - 2);
    const share = t * (HEAT.length - 1) - below;
    const [red, green, blue, opacity] = HEAT[below].map((from, i) => from + share * (HEAT[below + 1][i] - from));
    return [red, green, blue, 255 * opacity];
  }

  function drawHeat(item, values, low, high) {
    for (const old of item.querySelectorAll(".thumb canvas, .thumb .cell, .of-patch")) old.remove();
    if (values === null) return;
    const canvas = make("canvas", { width: grid, height: grid });
    const context = canvas.getContext("2d"), image = context.createImageData(grid, grid);
    values.forEach((value, i) => {
      image.data.set(heat(Math.min(Math.max((value - low) / (high - low || 1), 0), 1)), 4 * i);
    });
    context.putImageData(image, 0, 0);
    const best = values.indexOf(Math.max(...values));
    const frame = make("span", { className: "cell chosen" });
    place(frame, best);
    const alike = make("span", { className: "of-patch", textContent: values[best].toFixed(2), title: "cosine of the framed patch" });
    item.querySelector(".thumb").append(canvas, frame, alike);
  }

  function cellAt(event) {
    const box = at("seen").getBoundingClientRect();
    const [column, row] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]
      .map((share) => Math.min(Math.max(Math.floor(share * grid), 0), grid - 1));
    return row * grid + column;
  }

  function onKey(event) {
    const row = Math.floor(pointed / grid), column = pointed % grid;
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Enter" || event.key === " ") findPatch(pointed);
    else if (event.key === "Escape") clearPatch();
    else if (event.key in steps) {
      const inside = (n) => Math.min(Math.max(n, 0), grid - 1);
      pointed = inside(row + steps[event.key][0]) * grid + inside(column + steps[event.key][1]);
      place(at("pointed"), pointed);
    } else return;
    event.preventDefault();
  }

  // ---- Events ---------------------------------------------------------------------------------

  document.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const words = at("words")?.value.trim();
    if (words) search({ words });
    else fail("Type some words, or give a picture.");
  });
  at("file").addEventListener("change", (event) => {
    searchPicture(event.target.files[0]);
    event.target.value = "";  // so that the same file can be chosen again
  });
  at("class")?.addEventListener("change", () => { if (asked) search(asked); });
  at("clear").addEventListener("click", clearPatch);
  at("seen").addEventListener("click", (event) => findPatch(cellAt(event)));
  at("seen").addEventListener("pointermove", (event) => place(at("pointed"), cellAt(event)));
  at("seen").addEventListener("pointerleave", () => { at("pointed").hidden = true; });
  at("seen").addEventListener("keydown", onKey);
  at("seen").addEventListener("focus", () => { if (at("seen").matches(":focus-visible")) place(at("pointed"), pointed); });
  at("seen").addEventListener("blur", () => { at("pointed").hidden = true; });

  const holdsFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  addEventListener("dragover", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dragging"); });
  addEventListener("drop", (event) => {
    document.body.classList.remove("dragging");
    if (!holdsFiles(event)) return;
    event.preventDefault();
    searchPicture(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const [file] = event.clipboardData?.files ?? [];
    if (!file) return;
    event.preventDefault();
    searchPicture(file);
  });
})();
