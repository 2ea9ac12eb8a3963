//! Chat templates as transformers renders them: Jinja with trimmed blocks, Python's string methods, its
//! `tojson`, `raise_exception` and `strftime_now`. The template is the model's, the messages are the client's.

use super::{python, strftime};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value};
use openai::Message;
use serde_json::Map;
use std::collections::BTreeMap;
use std::time::SystemTime;

const NAME: &str = "chat";

/// Instructions of one rendering: hundreds of times what templates take for a long conversation, and a second or two of a
/// core. One that looks at all messages for each of them would take minutes for as many as fit into a body.
const MOST_STEPS: u64 = 20_000_000;

pub struct Template {
    environment: Environment<'static>,
    /// bos_token and its like.
    variables: BTreeMap<String, serde_json::Value>,
    /// The template tells `developer` from `system`; others get `system` for both.
    knows_developer: bool,
}

/// What a client brings to a template.
pub struct Conversation<'a> {
    pub messages: &'a [Message],
    pub add_generation_prompt: bool,
    pub continue_final_message: bool,
    pub kwargs: &'a Map<String, serde_json::Value>,
}

impl Template {
    pub fn new(source: String, variables: BTreeMap<String, serde_json::Value>) -> Result<Self, String> {
        let knows_developer = source.contains("developer");
        let mut environment = Environment::new();
        environment.set_syntax(syntax()?);
        environment.set_fuel(Some(MOST_STEPS));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", python::tojson);
        environment.add_template_owned(NAME, source).map_err(|error| format!("chat template: {error}"))?;
        Ok(Template { environment, variables, knows_developer })
    }

    /// The prompt as text. The error is the template's own complaint about these messages.
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<String, String> {
        let mut context = conversation.kwargs.clone();
        context.extend(self.variables.iter().map(|(name, value)| (name.clone(), value.clone())));
        let mut messages = self.messages(conversation.messages)?;
        if conversation.continue_final_message {
            mark_final(&mut messages)?;
        }
        context.insert("messages".into(), messages);
        context.insert("add_generation_prompt".into(), conversation.add_generation_prompt.into());
        let template = self.environment.get_template(NAME).map_err(|error| error.to_string())?;
        let text = template.render(Value::from(Serde(&context))).map_err(complaint)?;
        if conversation.continue_final_message { unfinished(text) } else { Ok(text) }
    }

    fn messages(&self, messages: &[Message]) -> Result<serde_json::Value, String> {
        let mut values = serde_json::to_value(messages).map_err(|error| error.to_string())?;
        let list = values.as_array_mut().into_iter().flatten();
        for message in list.filter(|message| !self.knows_developer && message["role"] == "developer") {
            message["role"] = "system".into();
        }
        Ok(values)
    }
}

/// transformers trims the line of a block tag on both sides.
fn syntax() -> Result<SyntaxConfig, String> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|error| error.to_string())
}

/// Stands at the end of a final message that is to be continued. Its space shows whether the template trims.
const MARK: &str = "\u{e000}baton-continues-here\u{e000} ";

const NOT_CONTINUED: &str =
    "continue_final_message: the final message is empty, or the chat template does not render it as it is";

fn mark_final(messages: &mut serde_json::Value) -> Result<(), String> {
    match messages.as_array_mut().and_then(|list| list.last_mut()).and_then(|last| last.get_mut("content")) {
        Some(serde_json::Value::String(content)) if !content.trim().is_empty() => {
            content.push_str(MARK);
            Ok(())
        }
        _ => Err(NOT_CONTINUED.into()),
    }
}

/// Cuts the prompt after the final message's text, so that the answer goes on from there.
fn unfinished(mut text: String) -> Result<String, String> {
    let at = text.rfind(MARK.trim_end()).ok_or(NOT_CONTINUED)?;
    let kept = if text[at..].starts_with(MARK) { at } else { text[..at].trim_end().len() };
    text.truncate(kept);
    Ok(text)
}

/// A template's `raise_exception` speaks to the client; anything else gets its place in the template too.
fn complaint(error: minijinja::Error) -> String {
    match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => {
            format!("the chat template takes more than {MOST_STEPS} steps for these messages; send fewer")
        }
        (ErrorKind::InvalidOperation, Some(detail)) => {
            format!("the chat template refuses these messages: {detail}")
        }
        _ => format!("the chat template failed on these messages: {error}"),
    }
}

fn raise_exception(message: String) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    strftime::format(&format, since.as_secs())
        .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn message(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into(), rest: Map::new() }
    }

    fn template(source: &str) -> Template {
        let variables = [("bos_token", json!("<s>")), ("eos_token", json!("</s>"))];
        Template::new(source.into(), variables.map(|(k, v)| (k.to_owned(), v)).into()).unwrap()
    }

    fn render(source: &str, messages: &[Message], kwargs: serde_json::Value) -> Result<String, String> {
        let kwargs = kwargs.as_object().unwrap();
        template(source).render(&Conversation {
            messages,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs,
        })
    }

    /// DeepSeek-V3.1's shape: thinking switch, history cut at `</think>`, namespaces, string methods.
    const V31: &str = "{% if not thinking is defined %}{% set thinking = false %}{% endif %}\
        {% set ns = namespace(system_prompt='', is_last_user=false) %}\
        {%- for message in messages %}{%- if message['role'] == 'system' %}\
        {% set ns.system_prompt = ns.system_prompt + message['content'] %}{%- endif %}{%- endfor %}\
        {{ bos_token }}{{ ns.system_prompt }}\
        {%- for message in messages %}\
        {%- if message['role'] == 'user' %}{{ '<U>' + message['content'] }}{%- endif %}\
        {%- if message['role'] == 'assistant' %}\
        {%- set content = message['content'] %}\
        {%- if '</think>' in content %}{%- set content = content.split('</think>', 1)[1] %}{%- endif %}\
        {{ '<A>' + content.strip() + eos_token }}{%- endif %}{%- endfor -%}\
        {% if add_generation_prompt %}{{ '<A>' + ('<think>' if thinking else '</think>') }}{% endif %}";

    #[test]
    fn deepseek_shapes_render() {
        let messages = [
            message("system", "Be brief."),
            message("user", "Hi"),
            message("assistant", "hm</think> Yes "),
            message("user", "Why?"),
        ];
        let text = render(V31, &messages, json!({})).unwrap();
        assert_eq!(text, "<s>Be brief.<U>Hi<A>Yes</s><U>Why?<A></think>");
        assert!(render(V31, &messages, json!({"thinking": true})).unwrap().ends_with("<A><think>"));
    }

    #[test]
    fn developer_is_system_where_the_template_knows_only_that() {
        let messages = [message("developer", "Be brief.")];
        assert_eq!(render("{{ messages[0].role }}", &messages, json!({})).unwrap(), "system");
        assert_eq!(
            render("{# developer #}{{ messages[0].role }}", &messages, json!({})).unwrap(),
            "developer"
        );
    }

    #[test]
    fn complaints_reach_the_client() {
        let error =
            render("{{ raise_exception('roles must alternate') }}", &[message("user", "a")], json!({}))
                .unwrap_err();
        assert_eq!(error, "the chat template refuses these messages: roles must alternate");
        assert!(render("{{ strftime_now('%Q') }}", &[], json!({})).unwrap_err().contains("%Q"));
    }

    #[test]
    fn json_is_pythons() {
        let kwargs = json!({"tool": {"name": "<b>", "price": 1.5, "list": [1, "é"], "none": null}});
        let text = render("{{ tool | tojson }}", &[], kwargs.clone()).unwrap();
        assert_eq!(text, r#"{"name": "<b>", "price": 1.5, "list": [1, "é"], "none": null}"#);
        let text = render("{{ tool.list | tojson(indent=2) }}", &[], kwargs).unwrap();
        assert_eq!(text, "[\n  1,\n  \"é\"\n]");
    }

    #[test]
    fn a_final_message_can_be_continued() {
        let messages = [message("user", "Hi"), message("assistant", "Well, ")];
        let conversation = |template: &Template| {
            template.render(&Conversation {
                messages: &messages,
                add_generation_prompt: false,
                continue_final_message: true,
                kwargs: &Map::new(),
            })
        };
        assert_eq!(conversation(&template(V31)).unwrap(), "<s><U>Hi<A>Well,");
        assert_eq!(conversation(&template("{{ messages[1].content }}</s>")).unwrap(), "Well, ");
        let ending = "{{ messages[1].content }}<end, Well, >";
        assert_eq!(conversation(&template(ending)).unwrap(), "Well, ", "found in what follows it too");
        assert!(conversation(&template("{{ bos_token }}")).is_err());
    }
}
