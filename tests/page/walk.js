// Uses the page by its keyboard as a person would, and leaves what it saw in the element "seen", as JSON.

const seen = { errors: [], saved: {} };
addEventListener("error", (event) => seen.errors.push(event.message));
addEventListener("unhandledrejection", (event) => seen.errors.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => seen.errors.push(`blocked ${event.blockedURI}`));
console.error = (...said) => seen.errors.push(said.join(" "));
const blobs = [];
URL.createObjectURL = (blob) => `blob:${blobs.push(blob)}`;
HTMLAnchorElement.prototype.click = function () {
  seen.saved[this.download] = blobs.at(-1).text();
};

const $ = (selector) => document.querySelector(selector);
const press = (key) =>
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const button = (place, label) =>
  [...document.querySelectorAll(`${place} button`)].find((each) => each.textContent === label);
const pause = (time = 1) => new Promise((done) => setTimeout(done, time));
const ADDRESS_TAKES = 200; // milliseconds, of which none pass by the clock
async function address() {
  await pause(ADDRESS_TAKES);
  return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
}
const table = () => [...$("#row-table").tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.textContent));

function isInside(node, box) {
  const [inner, outer] = [node, box].map((each) => each.getBoundingClientRect());
  return inner.top >= outer.top && inner.bottom <= outer.bottom;
}

async function opened(head) {
  while ($("#head-name").textContent !== `Head ${head}` || $("#head").ariaBusy !== "false") await pause();
}

async function walk() {
  while (!("ready" in document.documentElement.dataset)) await pause();
  await opened("0.2");
  seen.linked = { address: await address(), measure: $("#by").value, own: $("#text .own").dataset.position };
  press("Escape");
  for (const theme of ["dark", "light"]) {
    $("#theme").value = theme;
    $("#theme").dispatchEvent(new Event("change"));
  }
  seen.overview = {
    address: await address(),
    focused: document.activeElement.dataset.head,
    headHidden: $("#head").hidden,
  };
  seen.cells = [...document.querySelectorAll("#grid [role=gridcell]")].map((cell) => cell.getAttribute("aria-label"));
  seen.measures = [...$("#by").options].map((option) => option.value);
  seen.tabStops = document.querySelectorAll('#grid [tabindex="0"]').length;
  seen.curve = [...document.querySelectorAll("#curve title")].map((title) => title.textContent);
  button("#curve-tools", "CSV").click();
  $("#order").value = "down";
  $("#order").dispatchEvent(new Event("change"));
  seen.sorted = [...document.querySelectorAll("#grid [role=gridcell]")].map((cell) => cell.dataset.head);
  $("#order").value = "layer";
  $("#order").dispatchEvent(new Event("change"));
  $('#grid [data-head="0.2"]').focus();
  press("ArrowLeft");
  press("ArrowDown");
  seen.walkedTo = document.activeElement.dataset.head;
  press("Enter");
  await opened("1.1");
  seen.facts = $("#head-facts").textContent;
  seen.rows = [];
  Object.assign($("#text").style, { minHeight: "0", maxHeight: "40px" }); // of more lines
  while ($("#text .own").dataset.position !== "23") press("]");
  for (let query = 23; query >= 0; query--) {
    seen.rows.unshift({
      own: Number($("#text .own").dataset.position),
      table: table(),
      spoken: $("#row-summary").textContent,
      inView: isInside($("#text .own"), $("#text")),
    });
    press("[");
  }
  seen.first = (await address()).query;
  $("#view").focus();
  $("#view").blur();
  press("r");
  seen.readers = table();
  press("r");
  press("/");
  seen.finding = document.activeElement.id;
  document.activeElement.value = "W3w4";
  press("Enter");
  seen.found = { query: (await address()).query, said: $("#found").textContent };
  document.activeElement.blur();
  for (const label of ["SVG", "CSV"]) button("#map-tools", label).click();
  seen.saved.own = seen.saved[`head-1.1-query-${seen.found.query}.csv`];
  $("#live-eps").value = 1;
  $("#live-eps").dispatchEvent(new Event("input"));
  $("#live-k").value = 2;
  $("#live-k").dispatchEvent(new Event("input"));
  button("#map-tools", "CSV").click();
  seen.live = { address: await address(), spoken: $("#row-summary").textContent };
  $("#live-reset").click();
  seen.reset = await address();
  press("?");
  seen.help = $("#help").open;
  $("#help").close();
  press("ArrowRight");
  await opened("1.2");
  seen.liveHidden = $("#live").hidden;
  seen.ablated = $("#head-facts").textContent;
  for (const name of Object.keys(seen.saved)) seen.saved[name] = await seen.saved[name];
  seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
}

walk()
  .catch((error) => seen.errors.push(String(error.stack)))
  .finally(() => {
    const result = document.createElement("pre");
    result.id = "seen";
    result.textContent = JSON.stringify(seen);
    document.body.append(result);
  });
