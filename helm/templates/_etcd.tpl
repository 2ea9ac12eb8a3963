{{/* etcd over TLS: the services speak plain HTTP to etcd's own proxy in their pod, and only that holds the certificate. It starts before the
service and ends after it, as a worker that drains must still be able to say so. */}}

{{- define "baton.etcdProxy" -}}
{{- if .Values.etcd.tls.secret }}
- name: etcd-proxy
  image: {{ include "baton.image" (dict "image" .Values.etcd.image) }}
  imagePullPolicy: {{ .Values.etcd.image.pullPolicy }}
  restartPolicy: Always
  command:
    - etcd
    - grpc-proxy
    - start
    - --listen-addr=127.0.0.1:2379
    - --endpoints={{ join "," .Values.etcd.endpoints }}
    - --cacert=/etc/etcd-tls/{{ .Values.etcd.tls.ca }}
    - --cert=/etc/etcd-tls/{{ .Values.etcd.tls.cert }}
    - --key=/etc/etcd-tls/{{ .Values.etcd.tls.key }}
  securityContext:
    {{- include "baton.containerSecurity" . | nindent 4 }}
  resources:
    requests: {cpu: 50m, memory: 64Mi}
    limits: {memory: 256Mi}
  volumeMounts:
    - {name: etcd-tls, mountPath: /etc/etcd-tls, readOnly: true}
{{- end }}
{{- end -}}

{{- define "baton.etcdProxyVolume" -}}
{{- with .Values.etcd.tls.secret }}
- name: etcd-tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end -}}
