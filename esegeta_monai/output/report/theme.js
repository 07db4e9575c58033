(() => {
  "use strict";
  const button = document.getElementById("theme");
  const order = ["auto", "light", "dark"];
  let now = 0;
  button.addEventListener("click", () => {
    now = (now + 1) % order.length;
    button.textContent = `Theme: ${order[now]}`;
    if (now) document.documentElement.dataset.theme = order[now];
    else delete document.documentElement.dataset.theme;
  });
})();
