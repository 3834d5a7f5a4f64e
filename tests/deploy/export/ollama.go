// Renders a Modelfile's template as Ollama does (template/template.go): its messages, and all system texts together.
//
//	go run ollama.go < {"template": "...", "chats": [[{"role", "content"}, ...], ...]}
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var asked struct {
		Template string
		Chats    [][]Message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(asked.Template))
	texts := []string{}
	for _, chat := range asked.Chats {
		var system []string
		var messages []*Message
		for i := range chat {
			if chat[i].Role == "system" {
				system = append(system, chat[i].Content)
			}
			messages = append(messages, &chat[i])
		}
		var text bytes.Buffer
		values := map[string]any{"System": strings.Join(system, "\n\n"), "Messages": messages, "Response": ""}
		if err := parsed.Execute(&text, values); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
