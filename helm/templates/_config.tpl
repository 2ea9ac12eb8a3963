{{/* The services' configuration files. A service refuses a key that it does not know, so only what is set here or given as `config` is written. */}}

{{/* A table of TOML: plain keys first, then one level of tables. */}}
{{- define "baton.toml" -}}
{{- range $key, $value := . }}
{{- if not (or (kindIs "map" $value) (kindIs "invalid" $value)) }}
{{ $key }} = {{ include "baton.tomlValue" $value }}
{{- end }}
{{- end }}
{{- range $key, $value := . }}
{{- if and (kindIs "map" $value) $value }}
[{{ $key }}]
{{- range $inner, $setting := $value }}
{{- if not (kindIs "invalid" $setting) }}
{{ $inner }} = {{ include "baton.tomlValue" $setting }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Numbers come as floats, whole ones too. */}}
{{- define "baton.tomlValue" -}}
{{- if kindIs "float64" . -}}
{{- ternary (printf "%d" (int64 .)) (toJson .) (eq (floor .) .) -}}
{{- else if kindIs "slice" . -}}
[{{ range $index, $item := . }}{{ if $index }}, {{ end }}{{ include "baton.tomlValue" $item }}{{ end }}]
{{- else if kindIs "map" . -}}
{{- $items := list -}}
{{- range $key, $item := . }}{{ $items = append $items (printf "%s = %s" $key (include "baton.tomlValue" $item)) }}{{ end -}}
{ {{ join ", " $items }} }
{{- else -}}
{{ toRawJson . }}
{{- end -}}
{{- end -}}

{{/* The section that every service has; nothing without a collector. (dict "root" $ "own" keys) */}}
{{- define "baton.setTraces" -}}
{{- $traces := .root.Values.monitoring.traces -}}
{{- if $traces.endpoint }}{{ $_ := set .own "traces" (dict "endpoint" $traces.endpoint "sample" $traces.sample) }}{{ end -}}
{{- end -}}

{{- define "baton.gatewayToml" -}}
{{- $own := dict
    "listen" (printf "%s:%d" (include "baton.any" .) (int .Values.gateway.ports.http))
    "admin" (printf "%s:%d" (include "baton.any" .) (int .Values.gateway.ports.admin))
    "routers" (include "baton.routers" . | fromJsonArray)
    "model_dir" .Values.model.path
    "served_model_name" (list .Values.model.name)
    "timeouts" (dict "drain_ms" (mul 1000 .Values.gateway.drainSeconds)) -}}
{{- include "baton.setTraces" (dict "root" . "own" $own) -}}
{{- with .Values.gateway.keys }}{{ if .secret }}{{ $_ := set $own "keys" (dict "file" (printf "/etc/baton-keys/%s" .file)) }}{{ end }}{{ end -}}
{{- with .Values.gateway.adminToken }}{{ if .secret }}{{ $_ := set $own "admin_token_file" (printf "/etc/baton-admin/%s" .key) }}{{ end }}{{ end -}}
{{- with include "baton.tls" . }}{{ $_ := set $own "tls" (fromJson .) }}{{ end -}}
{{- include "baton.toml" (mergeOverwrite $own (deepCopy .Values.gateway.config)) -}}
{{- end -}}

{{- define "baton.routerToml" -}}
{{- $own := dict
    "listen" (printf "%s:%d" (include "baton.any" .) (int .Values.router.ports.grpc))
    "admin" (printf "%s:%d" (include "baton.any" .) (int .Values.router.ports.admin))
    "prefix" (include "baton.prefix" .)
    "lease_ms" .Values.etcd.leaseMs
    "drain_ms" (mul 1000 .Values.router.drainSeconds) -}}
{{- if ne .Values.etcd.mode "none" }}{{ $_ := set $own "etcd" (include "baton.etcdEndpoints" . | fromJsonArray) }}{{ end -}}
{{- with include "baton.etcdTls" . }}{{ $_ := set $own "etcd_tls" (fromJson .) }}{{ end -}}
{{- include "baton.setTraces" (dict "root" . "own" $own) -}}
{{- $_ := set $own "pools" (include "baton.desired" . | fromJson) -}}
{{- with include "baton.tls" . }}{{ $_ := set $own "tls" (fromJson .) }}{{ end -}}
{{- include "baton.toml" (mergeOverwrite $own (deepCopy .Values.router.config)) -}}
{{- end -}}

{{/* (dict "root" $ "pool" settings) */}}
{{- define "baton.workerToml" -}}
{{- $root := .root -}}
{{- $membership := dict "prefix" (include "baton.prefix" $root) "lease_ms" $root.Values.etcd.leaseMs -}}
{{- if eq $root.Values.etcd.mode "none" -}}
{{- $_ := set $membership "registry" (first (include "baton.routers" $root | fromJsonArray)) -}}
{{- else -}}
{{- $_ := set $membership "etcd" (include "baton.etcdEndpoints" $root | fromJsonArray) -}}
{{- with include "baton.etcdTls" $root }}{{ $_ := set $membership "tls" (fromJson .) }}{{ end -}}
{{- end -}}
{{- $own := dict
    "role" .pool.role
    "backend" .pool.backend
    "model" $root.Values.model.path
    "served_model_name" $root.Values.model.name
    "listen" (printf "%s:%d" (include "baton.any" $root) (int .pool.ports.grpc))
    "admin" (printf "%s:%d" (include "baton.any" $root) (int .pool.ports.admin))
    "drain_ms" (mul 1000 .pool.drainSeconds)
    "membership" $membership -}}
{{- include "baton.setTraces" (dict "root" $root "own" $own) -}}
{{- with .pool.adminToken }}{{ if .secret }}{{ $_ := set $own "admin_token_file" (printf "/etc/baton-admin/%s" .key) }}{{ end }}{{ end -}}
{{- with include "baton.tls" $root }}{{ $_ := set $own "tls" (fromJson .) }}{{ end -}}
{{- include "baton.toml" (mergeOverwrite $own (deepCopy .pool.config)) -}}
{{- end -}}

{{/* Each router by its own name: a gateway goes to another when one does not answer, which one address for all would hide. */}}
{{- define "baton.routers" -}}
{{- $name := printf "%s-router" (include "baton.fullname" .) -}}
{{- $urls := list -}}
{{- range $index := until (int .Values.router.replicas) -}}
{{- $urls = append $urls (printf "%s://%s-%d.%s.%s.svc:%d" (include "baton.scheme" $) $name $index $name $.Release.Namespace (int $.Values.router.ports.grpc)) -}}
{{- end -}}
{{- toJson $urls -}}
{{- end -}}

{{- define "baton.prefix" -}}
{{- .Values.etcd.prefix | default (printf "%s.%s" .Release.Namespace (include "baton.fullname" .)) -}}
{{- end -}}

{{- define "baton.etcdEndpoints" -}}
{{- if eq .Values.etcd.mode "bundled" -}}
{{- $name := printf "%s-etcd" (include "baton.fullname" .) -}}
{{- $urls := list -}}
{{- range $index := until 3 -}}
{{- $urls = append $urls (printf "http://%s-%d.%s.%s.svc:2379" $name $index $name $.Release.Namespace) -}}
{{- end -}}
{{- toJson $urls -}}
{{- else -}}
{{- toJson .Values.etcd.endpoints -}}
{{- end -}}
{{- end -}}

{{/* Of the addresses of routers and workers. */}}
{{- define "baton.scheme" -}}
{{- ternary "https" "http" .Values.tls.enabled -}}
{{- end -}}

{{/* Paths of the files by which services know each other, and the name that all bear, as JSON; nothing without TLS. */}}
{{- define "baton.tls" -}}
{{- with .Values.tls -}}
{{- if .enabled -}}
{{- dict "ca" (printf "/etc/baton-tls/%s" .ca) "cert" (printf "/etc/baton-tls/%s" .cert) "key" (printf "/etc/baton-tls/%s" .key) "server_name" .serverName | toJson -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "baton.tlsSecret" -}}
{{- .Values.tls.secret | default (printf "%s-tls" (include "baton.fullname" .)) -}}
{{- end -}}

{{- define "baton.tlsVolume" -}}
{{- if .Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ include "baton.tlsSecret" . }}, defaultMode: 0440}
{{- end }}
{{- end -}}

{{- define "baton.tlsMount" -}}
{{- if .Values.tls.enabled }}
- {name: tls, mountPath: /etc/baton-tls, readOnly: true}
{{- end }}
{{- end -}}

{{/* Paths of the files that etcd's Secret brings, as JSON; nothing without it. */}}
{{- define "baton.etcdTls" -}}
{{- with .Values.etcd.tls -}}
{{- if .secret -}}
{{- $files := dict "ca" (printf "/etc/etcd-tls/%s" .ca) -}}
{{- if .cert }}{{ $_ := set $files "cert" (printf "/etc/etcd-tls/%s" .cert) }}{{ $_ := set $files "key" (printf "/etc/etcd-tls/%s" .key) }}{{ end -}}
{{- toJson $files -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "baton.etcdTlsVolume" -}}
{{- with .Values.etcd.tls.secret }}
- name: etcd-tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end -}}

{{- define "baton.etcdTlsMount" -}}
{{- if .Values.etcd.tls.secret }}
- {name: etcd-tls, mountPath: /etc/etcd-tls, readOnly: true}
{{- end }}
{{- end -}}
