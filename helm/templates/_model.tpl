{{/* Where the model's files come from: a claim, a directory of the machine, or a container that fetches them; with none of them, from the image. */}}

{{/* (dict "root" $ "volume" the part's own or the release's) */}}
{{- define "baton.modelVolume" -}}
{{- with .volume }}
- name: model
  {{- if .claim }}
  persistentVolumeClaim: {claimName: {{ .claim.name }}, readOnly: true}
  {{- else if .hostPath }}
  hostPath: {path: {{ .hostPath.path }}, type: Directory}
  {{- else if .init }}
  {{- if .init.claim }}
  persistentVolumeClaim: {claimName: {{ .init.claim }}}
  {{- else }}
  emptyDir: {{ with .init.sizeLimit }}{sizeLimit: {{ . }}}{{ else }}{}{{ end }}
  {{- end }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "baton.modelMount" -}}
{{- with .volume }}
- name: model
  mountPath: {{ $.root.Values.model.path }}
  readOnly: true
  {{- with (.claim | default dict).subPath }}
  subPath: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "baton.modelInit" -}}
{{- with (.volume | default dict).init }}
- name: fetch-model
  image: {{ .image }}
  {{- with .command }}
  command:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .args }}
  args:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .env }}
  env:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .envFrom }}
  envFrom:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .resources }}
  resources:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- include "baton.containerSecurity" $ | nindent 4 }}
  volumeMounts:
    - {name: model, mountPath: {{ $.root.Values.model.path }}}
{{- end }}
{{- end -}}
