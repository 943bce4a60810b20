// The form of explain_form.html: makes the bytes of a request, asks POST /explain, and shows the stages. Texts of the answer are
// set as text, never as markup.
"use strict";
(() => {
  const form = document.getElementById("explain-form");
  const result = document.getElementById("explain-result");
  if (!form || !result) return;
  form.hidden = false;

  const element = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  // A request as a client sends it. The length of a body is ours to say, unless the fields say it.
  const request = (data) => {
    const fields = data.get("fields").split(/\r?\n/).filter((line) => line.trim() !== "");
    const body = new TextEncoder().encode(data.get("body").replace(/\r\n/g, "\n"));
    const named = (name) => fields.some((line) => line.toLowerCase().startsWith(name + ":"));
    if (body.length > 0 && !named("content-length") && !named("transfer-encoding")) {
      fields.push("Content-Length: " + body.length);
    }
    const head = new TextEncoder().encode([data.get("method") + " " + data.get("target") + " HTTP/1.1", ...fields, "", ""].join("\r\n"));
    let bytes = "";
    for (const byte of [...head, ...body]) bytes += String.fromCharCode(byte);
    return btoa(bytes);
  };

  const call = (data) => {
    const asked = { base64: request(data), tls: data.get("tls") !== null };
    if (data.get("client")) asked.client = data.get("client").trim();
    if (data.get("user")) {
      const scopes = data.get("scopes").split(",").map((scope) => scope.trim()).filter((scope) => scope !== "");
      asked.as = { user: data.get("user").trim(), scopes };
    }
    return asked;
  };

  const rule = (one) => one.key + (one.value ? " = " + one.value : "") + " (" + (one.place || "the default") + ")";

  const show = (told) => {
    const words = { forward: "Forwarded: the backend answers", refuse: "Refused with " + told.status, unknown: "Not known whether the token is valid", incomplete: "Not whole: " + told.status };
    result.replaceChildren(element("p", words[told.verdict] + ". Reason: " + told.reason + ", route: " + told.route, "explain-" + told.verdict));
    if (told.verdict !== "forward" && told.means) {
      result.append(element("p", "What it means: " + told.means), element("p", "What to do: " + told.advice));
    }
    const table = element("table");
    const head = table.createTHead().insertRow();
    for (const title of ["Stage", "Outcome", "What it saw and decided", "By"]) {
      const cell = element("th", title);
      cell.scope = "col";
      head.append(cell);
    }
    const rows = table.createTBody();
    for (const stage of told.stages) {
      const row = rows.insertRow();
      row.className = "explain-" + stage.outcome.replace(" ", "-");
      const name = element("th", stage.stage);
      name.scope = "row";
      row.append(name, element("td", stage.outcome));
      const said = element("td", stage.decided);
      for (const line of stage.saw) said.append(element("br"), line);
      const by = element("td");
      for (const one of stage.rules) by.append(rule(one), element("br"));
      row.append(said, by);
    }
    const scroll = element("div", undefined, "scroll");
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "Stages");
    scroll.append(table);
    result.append(scroll);
    if (told.upstream) result.append(element("h3", "Goes to " + told.upstream.upstream), element("pre", told.upstream.head));
    if (told.answer) result.append(element("h3", "The client gets"), element("pre", told.answer));
    const cases = element("ul");
    for (const one of told.what_if) {
      const end = one.verdict === "forward" ? "forwarded" + (one.upstream ? " to " + one.upstream : "") : one.status + " " + one.reason;
      cases.append(element("li", one.change + ": " + end + (one.same ? " (the same)" : "")));
    }
    if (told.what_if.length > 0) result.append(element("h3", "What would change it"), cases);
    for (const note of told.notes) result.append(element("p", "Note: " + note));
  };

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      const answer = await fetch("/explain", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(call(new FormData(form))),
      });
      if (answer.ok) show((await answer.json()).explanation);
      else result.replaceChildren(element("p", answer.status + ": " + (await answer.text())));
    } catch (error) {
      result.replaceChildren(element("p", "The listener did not answer: " + error.message));
    }
  });
})();
