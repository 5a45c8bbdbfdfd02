/** Light, dark, or as the system; kept in the browser. */

import { by } from "./text.js";

const KEPT_AS = "socketdock-theme";

export class Theme {
  constructor() {
    const select = by("theme");
    select.value = localStorage.getItem(KEPT_AS) ?? "";
    this.set(select.value);
    select.addEventListener("change", () => {
      if (select.value) localStorage.setItem(KEPT_AS, select.value);
      else localStorage.removeItem(KEPT_AS);
      this.set(select.value);
    });
  }

  /** @param {string} theme empty: as the system */
  set(theme) {
    document.documentElement.dataset.theme = theme;
    document.dispatchEvent(new Event("theme"));
  }
}
