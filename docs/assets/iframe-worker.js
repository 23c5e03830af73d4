/* Search without a server: browsers start no worker for a page that is opened as a file, so its script runs in a frame. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      const ready = new Promise((loaded) => {
        frame.addEventListener("load", () => {
          const inside = frame.contentWindow
          // what the script posts comes to us, and what it imports are scripts of the frame, one after the other
          inside.postMessage = (data) => {
            const event = new MessageEvent("message", { data })
            this.dispatchEvent(event)
            this.onmessage?.(event)
          }
          const add = (source) => new Promise((done, failed) => {
            const script = inside.document.createElement("script")
            script.src = source
            script.onload = done
            script.onerror = failed
            inside.document.head.append(script)
          })
          inside.importScripts = (...sources) =>
            sources.reduce((before, source) => before.then(() => add(source)), Promise.resolve())
          add(address).then(() => loaded(inside))
        })
      })
      this.post = (data) => ready.then((inside) => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
      document.body.append(frame)
      this.frame = frame
    }
    postMessage(data) { this.post(data) }
    terminate() { this.frame.remove() }
  }
}
